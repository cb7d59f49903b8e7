"""What is never written down: passwords and signatures come from the environment, and stay there.

A run's configuration, command, records and logs are kept and shown round. So a URL that carries a credential is refused
before anything of it is printed or written; fsspec's file systems find theirs in the environment or in their own files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from perilune.pretrain.errors import InputError

_PASSWORD = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]+@|(?<=://)[^/@\s]{20,}@")  # user:password@, or a token alone
_QUERY = re.compile(
    r"(?i)[?&](x-(amz|goog|oss)-(signature|credential|security-token)|signature|sig|(aws)?accesskeyid|googleaccessid|"
    r"(access_?|auth_?|api_?)?(token|key)|password|secret)=[^&#\s]*"
)
NAME = re.compile(
    r"(?i)(^|_)(token|secret|password|passwd|passphrase|credentials?|(api|access|private|secret)?_?key)($|_)"
)


def hidden(text: str) -> str:
    """`text` without what its URLs carry of credentials."""
    return _QUERY.sub(lambda found: found[0].partition("=")[0] + "=***", _PASSWORD.sub("***@", text))


def refuse(where: str, texts: Iterable[str]) -> None:
    """Raise InputError for the first of `texts` that carries a credential; the message does not repeat it."""
    for text in texts:
        if hidden(text) != text:
            raise InputError(
                f"{where}={hidden(text)} carries a credential, which would be written into configurations, records and "
                "logs; leave it out of the URL: s3:// and gs:// take theirs from the environment (AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS), https:// from FSSPEC_HTTP there"
            )
