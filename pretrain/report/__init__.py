"""`perilune report`: a run directory, or several side by side, as one HTML file that needs no network.

`read` reads what a run wrote, `thin` makes series of any length short, `describe` puts facts into words and units,
`page` builds the file; `page.html`, `page.css`, `lines.js`, `heat.js` and `page.js` are its parts.
"""
