"""A GPU that the CPU plays: where there is none, what a GPU runs is run, and a tensor in the wrong place is found.

torch tells that there is a CUDA device. Memory is marked as that device's or the CPU's, the CPU computes all of it, and
what a GPU would refuse is refused: an operation on tensors of both, a view of the GPU's memory in NumPy, a collective
of NCCL on the CPU's memory. So Megatron-core runs as it is shipped, without parallel/cpu.py's patches, and our code
takes the ways it takes on a GPU. Streams and events do nothing, NCCL is gloo, and nothing is said of kernels and speed.
"""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
MOVES = ("copy_", "_to_copy", "_local_scalar_dense")  # from one to the other
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")  # a GPU's tensor, by the CPU's numbers too
NO_NUMBERS = ("cat", "stack", "_fused_adamw_", "_fused_adam_", "index_select", "gather", "scatter", "mm", "bmm")
COLLECTIVES = (
    "all_reduce broadcast reduce all_gather all_gather_into_tensor reduce_scatter_tensor all_to_all_single send recv "
    "batch_isend_irecv"
).split()


class WrongPlace(RuntimeError):
    """What a GPU would have refused."""


def played[T](function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` with the GPU; for a process that never computes without it before or after."""
    _install()
    with _MODE, _Operations():
        return function(*arguments)


def on_gpu(x: torch.Tensor) -> bool:
    return _place(x) is not False


def _place(x: torch.Tensor) -> bool | None:
    """True: the GPU's; None: zeros that autograd made for a gradient that nobody asked for, where it belongs."""
    place: bool | None = getattr(x.untyped_storage(), "played_gpu", False)
    return place


def _mark(x: torch.Tensor, gpu: bool | None) -> torch.Tensor:
    x.untyped_storage().played_gpu = gpu  # type: ignore[attr-defined]
    return x


def _tensors(*of: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(of) if isinstance(x, torch.Tensor)]


def _flat(*groups: Iterable[Any]) -> list[torch.Tensor]:
    """As `_tensors`, of an operation's own arguments and results: tensors and lists of them."""
    found = []
    for one in itertools.chain(*groups):
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif isinstance(one, list | tuple):
            found += _flat(one)
    return found


def _moved(x: torch.Tensor, gpu: bool, then: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> torch.Tensor:
    """`then(x)` in the memory of one or the other: in its own if it is there."""
    if on_gpu(x) == gpu:
        return then(x)
    with _disable_current_modes():
        x = then(x.clone())
    return _mark(x, gpu)


def _means_gpu(device: Any) -> bool:
    kind = device.type if isinstance(device, torch.device) else device
    return kind.startswith("cuda") if isinstance(kind, str) else isinstance(kind, int)


class _Operations(TorchDispatchMode):
    """Every operation, those of backward too: all its tensors are in one place, and so is what it makes."""

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _flat(args, kwargs.values())
        places = [_place(x) for x in given]
        gpu = any(place is not False for place in places) if given else (_calls[-1] if _calls else None)
        if given and gpu and False in places:
            name = str(func).split(".")[1]
            self._check(func, name, args, kwargs, given)
            gpu = on_gpu(args[0]) if name in INDEXED else True
        memory = {x.untyped_storage()._cdata for x in given}
        out = func(*args, **kwargs)
        for made in _flat((out,), ()):
            if made.untyped_storage()._cdata not in memory:
                _mark(made, gpu)
        return out

    def _check(self, func: Any, name: str, args: Any, kwargs: Any, given: list[torch.Tensor]) -> None:
        if name in MOVES:
            return
        numbers = name not in NO_NUMBERS  # one number of the CPU's goes with a GPU's tensors
        here = [x for x in given if not on_gpu(x) and not (numbers and x.dim() == 0)]
        written = [
            argument.name
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and _tensors(value)
            if not all(map(on_gpu, _tensors(value)))
        ]
        written += [name for name in ("out",) if not all(map(on_gpu, _tensors(kwargs.get(name))))]
        if name in INDEXED and on_gpu(args[0]):
            here = [x for x in _tensors(args[2:]) if not on_gpu(x) and x.dim()]
        if here or written:
            places = ", ".join(f"{'GPU' if on_gpu(x) else 'CPU'} {list(x.shape)}" for x in given)
            raise WrongPlace(f"{func} of tensors in different places: {places}")


class _Places(TorchFunctionMode):
    """What Python asks of a tensor's place, and what it says of a new one's."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _ANSWERS:
            return _ANSWERS[func](*args, **kwargs)
        if getattr(func, "__name__", "") == "_parse_to":  # of Module.to, which then moves each of its tensors
            return func(*args, **kwargs)
        device = kwargs.get("device")
        _calls.append(_means_gpu(device) if device is not None else any(map(on_gpu, _tensors(args, kwargs))))
        try:
            made = func(*args, **(kwargs if device is None else {**kwargs, "device": CPU}))
        finally:
            _calls.pop()
        if device is None:
            return made
        if func is torch.as_tensor:
            return _moved(made, _means_gpu(device))
        for x in _tensors(made):
            _mark(x, _means_gpu(device))
        return made


def _to(x: torch.Tensor, *rest: Any, **kwargs: Any) -> torch.Tensor:
    target, left = on_gpu(x), list(rest)
    if (device := kwargs.pop("device", None)) is not None:
        left.insert(0, device)
    for at, one in enumerate(left):
        if isinstance(one, torch.Tensor):
            target = on_gpu(one)
        elif isinstance(one, torch.device | str) or (at == 0 and type(one) is int):
            target, left[at] = _means_gpu(one), CPU
    return _moved(x, target, lambda x: torch.Tensor.to(x, *left, **kwargs))


def _type(x: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
    if isinstance(dtype, str):
        return _moved(x, ".cuda." in dtype, lambda x: x.type(dtype.replace(".cuda.", ".")))
    if dtype is not None:
        return x.type(dtype, **kwargs)
    return x.type().replace("torch.", "torch.cuda." if on_gpu(x) else "torch.")


def _numpy(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if on_gpu(x):
        raise WrongPlace("NumPy cannot see a GPU's memory: use Tensor.cpu() first")
    return x.numpy(*args, **kwargs)


def _array(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return _numpy(x).__array__(*args, **kwargs)


_T = torch.Tensor
_ANSWERS: dict[Any, Callable[..., Any]] = {
    _T.device.__get__: lambda x: GPU if on_gpu(x) else CPU,  # type: ignore[attr-defined]
    _T.is_cuda.__get__: on_gpu,  # type: ignore[attr-defined]
    _T.is_cpu.__get__: lambda x: not on_gpu(x),  # type: ignore[attr-defined]
    _T.get_device: lambda x: 0 if on_gpu(x) else -1,
    _T.cuda: lambda x, *args, **kwargs: _moved(x, True),
    _T.cpu: lambda x, *args, **kwargs: _moved(x, False),
    _T.pin_memory: lambda x, *args, **kwargs: x,
    _T.is_pinned: lambda x, *args, **kwargs: False,
    _T.to: _to,
    _T.type: _type,
    _T.numpy: _numpy,
    _T.__array__: _array,
}
_MODE = _Places()
_calls: list[bool] = []  # from Python that go on: whether what they make is the GPU's
_installed: list[bool] = []


class _Stream:
    """Of work that is done in order anyway; an event too."""

    cuda_stream, device = 0, GPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in ("wait_stream", "wait_event", "wait", "record", "synchronize"):
            return lambda *args: None
        if name in ("record_event", "query", "elapsed_time"):
            return lambda *args: {"record_event": self, "query": True, "elapsed_time": 0.0}[name]
        raise AttributeError(name)


def _install() -> None:
    """torch tells of a GPU from here on."""
    if _installed:
        return
    _installed.append(True)
    numbers = torch.Generator()
    facts = types.SimpleNamespace(name="played", total_memory=80 << 30, major=9, minor=0, multi_processor_count=132)
    answers: dict[str, Any] = {
        **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), True),
        **dict.fromkeys(("current_device", "is_current_stream_capturing", "initial_seed"), 0),
        **dict.fromkeys(("set_device", "synchronize", "empty_cache", "init", "set_stream"), None),
        **dict.fromkeys(
            ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 1 << 20
        ),
        **{"reset_peak_memory_stats": None, "device_count": 1, "get_device_name": "played"},
        **{"get_device_capability": (9, 0), "get_device_properties": facts},
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **kwargs: _answer)
    torch.cuda.Stream = torch.cuda.Event = _Stream  # type: ignore[misc,assignment]
    for name in ("current_stream", "default_stream", "stream", "device"):
        setattr(torch.cuda, name, _Stream)
    torch.cuda._lazy_call = lambda function, **kwargs: function()
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *args, **kwargs: numbers.get_state()
    torch.cuda.set_rng_state = lambda state, *args: numbers.set_state(state)  # type: ignore[assignment,misc]
    torch.cuda.manual_seed = torch.cuda.manual_seed_all = numbers.manual_seed  # type: ignore[assignment]
    torch.cuda.default_generators = (numbers,)
    torch.cuda.nccl.version = lambda: (2, 27, 3)
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
    Optimizer._accelerator_graph_capture_health_check = lambda self: None  # type: ignore[method-assign]
    run = torch.autograd._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with _MODE:  # off inside of what it answers, of which Tensor.backward is one
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward
    from perilune.kernels import cross_entropy

    cross_entropy._triton = lambda: None  # its kernels are tested by Triton's interpreter (tests/kernels)
    _install_collectives()


def _install_collectives() -> None:
    """NCCL for every group that is not asked to be gloo's: it takes a GPU's tensors alone, and gloo a CPU's."""
    new_group, of_gloo, start = dist.new_group, set(), dist.init_process_group

    def begin(backend: str | None = None, **kwargs: Any) -> None:
        start("gloo", **kwargs)

    def new(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        group = new_group(ranks, timeout, "gloo")
        if backend == "gloo":
            of_gloo.add(group)
        return group

    def checked(collective: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(collective).parameters)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            sent = given.get("p2p_op_list", ())
            gpu = (sent[0].group if sent else given.get("group")) not in of_gloo
            wrong = [list(x.shape) for x in _tensors(given, [one.tensor for one in sent]) if on_gpu(x) != gpu]
            if wrong:
                raise WrongPlace(f"{collective.__name__} in a group of {'NCCL' if gpu else 'gloo'} of {wrong}")
            return collective(*args, **kwargs)

        return call

    dist.init_process_group, dist.new_group = begin, new
    dist.get_backend = lambda group=None: "gloo" if group in of_gloo else "nccl"
    for name in COLLECTIVES:
        setattr(dist, name, checked(getattr(dist, name)))
