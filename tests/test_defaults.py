"""torch's default dtype and device, whatever a user or a library sets them to, change nothing in the results.

Everything runs in processes of its own: a buffer of the wrong size is a crash, not an exception.
"""

from __future__ import annotations

import ast
import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

DEFAULTS = ["bfloat16", "float16", "float64", "meta"]
TESTS = Path(__file__).parent


@contextlib.contextmanager
def default(name: str) -> Iterator[None]:
    """The default dtype, or the default device "meta"."""
    if name == "meta":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def run(job: Callable[..., None], *arguments: object) -> None:
    call = f"import test_defaults; test_defaults.{job.__name__}({', '.join(map(repr, arguments))})"
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=TESTS, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-3000:]}"


def flat(value: object) -> list[torch.Tensor]:
    """Every tensor in a nest of tuples, dataclasses and lists, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "__dataclass_fields__"):
        value = list(vars(value).values())
    return [tensor for part in value for tensor in flat(part)] if isinstance(value, list | tuple) else []


def assert_equal_bits(one: object, two: object, what: object) -> None:
    for left, right in zip(flat(one), flat(two), strict=True):
        assert (left.dtype, left.device, left.shape) == (right.dtype, right.device, right.shape), what
        assert torch.equal(bits(left), bits(right)), what


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


# --- search, rounding, sums, fingerprints, metrics ---


def numerics_job(name: str) -> None:
    from daq_lightning import (
        PerBlock,
        PerChannel,
        PerTensor,
        ScaleSearch,
        absmax_scale,
        delta_metrics,
        dequantize,
        model_metrics,
        quantize,
        search_scale,
    )
    from daq_lightning.checkpoint.fingerprint import fingerprint
    from daq_lightning.numerics.backends import reference
    from daq_lightning.numerics.lora import LoraFactors, merge_lora
    from daq_lightning.numerics.objectives import gain, measure, score

    generator = torch.Generator().manual_seed(0)
    base = torch.randn(70, 150, generator=generator)
    weight = base + 0.01 * torch.randn(70, 150, generator=generator)
    weight[3] = 0
    left, right = torch.randn(70, 4, generator=generator), torch.randn(4, 150, generator=generator)
    # equal scores on both sides of alpha = 1, which the nearer one decides
    tied, tied_base = torch.tensor([[448 * 512, 5.3]]), torch.tensor([[0.0, 5.0]])
    symmetric = ScaleSearch(metric="sign", alpha_min=0.54, alpha_max=1.46, n_coarse=2, n_fine=0)
    empty = torch.zeros(0, 4)
    target = torch.arange(70)
    searches = [
        ScaleSearch(metric="cosine"),
        ScaleSearch.dense(16),
        ScaleSearch(metric="sign", alpha_scope="layer"),
    ]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    pairs = [(weight.to(dtype), base.to(dtype)) for dtype in dtypes]

    def results() -> Iterator[tuple[object, object]]:
        for w, b in pairs:
            for granularity in (PerBlock(32, 32), PerChannel(), PerTensor()):
                for scale_format in ("float32", "bfloat16", "ue8m0"):
                    what = (str(w.dtype), granularity, scale_format)
                    scale = absmax_scale(w, granularity, scale_format=scale_format)
                    codes = quantize(w, scale, granularity)
                    read = dequantize(codes, scale, granularity)
                    stats = measure(w, b, read)
                    yield (
                        what,
                        (
                            scale,
                            codes,
                            read,
                            stats,
                            gain(stats),
                            score(stats, "hybrid"),
                            score(stats, "cosine"),
                        ),
                    )
                for search in searches:
                    for backend in (None, reference):
                        yield (
                            (str(w.dtype), granularity, search, backend),
                            search_scale(w, b, granularity, search, backend=backend),
                        )
            yield "fingerprint", torch.tensor(int(fingerprint(w)[:8], 16), dtype=torch.int64, device="cpu")
        for backend in (None, reference):
            yield "tie", search_scale(tied, tied_base, PerTensor(), symmetric, backend=backend)
        wide = torch.cat([weight] * 250, 1)[:2]  # groups beyond the cache
        yield "wide", search_scale(wide, wide.flip(1), PerChannel())
        yield "empty", absmax_scale(empty, PerChannel())
        yield "empty", torch.tensor(int(fingerprint(empty)[:8], 16), dtype=torch.int64, device="cpu")
        factors = LoraFactors(A_RN=right, B_MR=left, scaling=0.5, magnitude=left[:, 0])
        yield "lora", merge_lora(weight, [factors])
        metrics = delta_metrics()
        metrics.update(base, weight, base.flip(0))
        yield "metrics", list(metrics.compute().values())
        tokens = model_metrics(base=True)
        tokens.update(logits=weight, reference_logits=weight.flip(0), base_logits=base, target=target)
        yield "tokens", list(tokens.compute().values())

    expected = list(results())
    with default(name):
        got = list(results())
    assert len(expected) > 70
    for (what, one), (_, two) in zip(expected, got, strict=True):
        assert_equal_bits(one, two, what)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULTS)
def test_numerics_do_not_depend_on_the_default_dtype_and_device(name):
    run(numerics_job, name)


# --- exports ---


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def export_job(folder: str, names: list[str]) -> None:
    from tiny_models import llama, make_pair

    from daq_lightning import ScaleSearch, export_checkpoint, load_checkpoint

    base, post = make_pair(Path(folder), llama)
    search = ScaleSearch(n_coarse=3, n_fine=2)

    def export(out: Path) -> tuple[dict[str, bytes], list[object]]:
        report = export_checkpoint(post, base, out, search=search)
        loaded = load_checkpoint(out)
        return contents(out), [*(loaded[name] for name in loaded), list(report.totals("searched"))]

    expected, tensors = export(Path(folder) / "float32" / "export")
    for name in names:
        with default(name):
            got, loaded = export(Path(folder) / name / "export")
        expected["daq_report.json"] = expected["daq_report.json"].replace(b"/float32/", f"/{name}/".encode())
        assert [file for file in {**expected, **got} if expected.get(file) != got.get(file)] == [], name
        assert_equal_bits(tensors, loaded, name)
        expected["daq_report.json"] = expected["daq_report.json"].replace(f"/{name}/".encode(), b"/float32/")


@pytest.mark.slow
def test_exports_do_not_depend_on_the_default_dtype_and_device(tmp_path):
    run(export_job, str(tmp_path), DEFAULTS)


# --- the callback ---


def callback_job(folder: str, name: str) -> None:
    """Under a default dtype all of training runs; under a default device, which no Trainer bears, hooks."""
    import copy

    from live import Tuning, fit, tiny_llama

    from daq_lightning import DeltaAwareQuantization, ScaleSearch, export_checkpoint, load_checkpoint

    class Hooks(DeltaAwareQuantization):
        def __getattribute__(self, attribute: str) -> object:
            value = super().__getattribute__(attribute)
            if name != "meta" or not (attribute.startswith("on_") or attribute in ("setup", "state_dict")):
                return value

            def hook(*arguments: object, **options: object) -> object:
                with torch.device("meta"):
                    return value(*arguments, **options)

            return hook

    search = ScaleSearch(n_coarse=3, n_fine=2)
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    exports = Path(folder) / name / "exports"
    for kind in ("memory", "auto"):
        callback = Hooks(str(exports / kind), base=kind, search=search, every_n_train_steps=2)
        module = Tuning(copy.deepcopy(model))
        with contextlib.nullcontext() if name == "meta" else default(name):
            fit(Path(folder) / name, callback, module=module)
        assert [path.name for path in callback.exports] == ["step=2", "step=4"]
        assert all(isinstance(value, float) for value in callback.metrics.values())
        logged = {
            key: float(value)
            for key, value in module.trainer.callback_metrics.items()
            if key.startswith("daq/")
        }
        assert logged.keys() == callback.metrics.keys()
        for key, value in callback.metrics.items():
            assert abs(logged[key] - value) <= 1e-6 * abs(value), key  # float32, as other metrics
        for part, state in (("post", module.model.state_dict()), ("base", before)):
            saved = copy.deepcopy(model)
            saved.load_state_dict(state)
            saved.save_pretrained(Path(folder) / name / kind / part)
        folders = (Path(folder) / name / kind / part for part in ("post", "base", "expected"))
        post_folder, base_folder, out = folders
        export_checkpoint(post_folder, base_folder, out, search=search)
        expected, written = (load_checkpoint(path).raw for path in (out, callback.exports[-1]))
        assert expected.keys() == written.keys()
        for key in expected:
            assert_equal_bits(expected[key], written[key], key)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULTS)
def test_the_callback_does_not_depend_on_the_default_dtype_and_device(tmp_path, name):
    run(callback_job, str(tmp_path), name)


# --- the case that was found in use ---


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULTS)
def test_a_search_under_another_default_does_not_crash(name):
    setting = (
        "torch.set_default_device('meta')" if name == "meta" else f"torch.set_default_dtype(torch.{name})"
    )
    code = (
        "import torch; from daq_lightning import search_scale, PerChannel; w = torch.randn(4096, 128); v = "
        f"w + .01; expected = search_scale(w, v, PerChannel()); {setting}; found = search_scale(w, v, "
        "PerChannel()); assert torch.equal(found.scale, expected.scale)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"


FACTORIES = {
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "full",
    "linspace",
    "logspace",
    "ones",
    "rand",
    "randn",
    "tensor",
    "zeros",
}


def test_every_allocation_states_dtype_and_device():
    package = TESTS.parent / "daq_lightning"
    silent = [
        f"{path.relative_to(package)}:{call.lineno} torch.{call.func.attr}"
        for path in sorted(package.rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and call.func.attr in FACTORIES
        and not {"dtype", "device"} <= {keyword.arg for keyword in call.keywords}
        and path.name != "cli.py"  # tries a device, whatever the dtype
    ]
    assert silent == []
