"""Report, manifest, config, index and adapter files that anybody may have written end in a clean error, soon.

Each example changes one or two places of a valid JSON file (or its text) and runs the commands that read it.
A manifest gets the fingerprint of its changed content, as a forger would give it.
"""

import contextlib
import io
import json
import os
import shutil

import pytest
import tiny_models
import transformers
from fuzz import as_bytes, changed, places, signed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daq_lightning import ScaleSearch, export_checkpoint
from daq_lightning.cli import main
from daq_lightning.cli.words import DONE, PROBLEMS, REFUSED

EXAMPLES = int(os.environ.get("DAQ_HOSTILE_EXAMPLES", "60"))
QUICK = ["--n-coarse", "2", "--n-fine", "1"]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": 16}

HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 7, 10**7, 10**15, 2**63, 10**400, -(10**15), 0.5, 1e300, float("nan"),
    float("inf")]),
    st.sampled_from(
        [
            "", " ", "x", "re:(", "re:(a+)+$", "(.*)*$", "(([a-z]+)*)*x", "(a|aa)+$", "[", "../..",
            "/dev/zero", "/",
            "a\0b", "\ud800", "é→", "kernels-community/x", "someone/evil", "bfloat16", "float32", "nan",
            "x" * 5000,
            "fp8", "compressed-tensors", "block", "channel", "LlamaForCausalLM", "CLIPModel", "qwen3_moe",
            "..",
        ]
    ),
    st.text(max_size=8),
    st.sampled_from([[], [[]], {}, [1], [128, 128], [0, 0], [None], ["re:("], ["re:(a+)+$"], {"": ""},
    {"x": 1}, [{}]]),
    st.lists(st.integers(-2, 300), max_size=4),
)  # fmt: skip


@st.composite
def mutations(draw, content):
    """What an attacker makes of a JSON file: its bytes, or the value they hold."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        text = json.dumps(content).encode()
        cut = draw(st.integers(0, len(text)))
        return text[:cut] + draw(st.binary(max_size=3))
    if kind == 1:
        return draw(
            st.sampled_from([b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b'"x"'])
        )
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(sorted(places(content), key=repr)))
        # names of tensors are many and alike: half of the examples are about the fields above and below them
        if draw(st.booleans()) and path:
            tops = [path for path in places(content) if len(path) <= 2]
            path = draw(st.sampled_from(sorted(tops, key=repr)))
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "add"]))
        content = changed(content, path, action, draw(HOSTILE))
    return content


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base of several files, a fine-tuned model, an adapter, an export, and the stage after it."""
    import peft

    folder = tmp_path_factory.mktemp("made")
    save = {"max_shard_size": "20KB"}
    base, post = tiny_models.make_pair(folder, lambda: tiny_models.llama(**SMALL), save=save)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 3})
    peft.get_peft_model(model, lora).save_pretrained(folder / "adapter")
    search = ScaleSearch(n_coarse=2, n_fine=1)
    export_checkpoint(post, base, folder / "fp8", search=search, max_shard_bytes=10_000)
    export_checkpoint(post, folder / "fp8", folder / "next", search=search, chain_from="deployed")
    return folder


def outcome(*command):
    """Exit code and what was printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(part) for part in command])
    return code, out.getvalue(), err.getvalue()


def check(command, expected):
    """A documented exit code; errors are one line that says something."""
    code, out, err = outcome(*command)
    assert code in expected, (command, code, err)
    if code == REFUSED:
        assert out == ""
        lines = [line for line in err.splitlines() if not line.startswith("FP8 export: ")]
        assert len(lines) == 1, err
        assert lines[0].startswith("daq-lightning: error: ")
        assert len(lines[0]) > 40
    return code


QUANTIZE = ["--base", "{made}/base", "--out", "{made}/out", *QUICK, "--quiet"]
TARGETS = {
    "report": ("fp8", "daq_report.json", [["inspect", "{fp8}"], ["verify", "{fp8}"], ["chain", "{next}"]]),
    "report recomputed": (
        "fp8",
        "daq_report.json",
        [["inspect", "{fp8}", "--base", "{made}/base", "--post", "{made}/post"]],
    ),
    "report as a page": ("fp8", "daq_report.json", [["inspect", "{fp8}", "--html", "{made}/page.html"]]),
    "manifest as a page": ("fp8", "daq_manifest.json", [["inspect", "{fp8}", "--html", "{made}/page.html"]]),
    "manifest": (
        "fp8",
        "daq_manifest.json",
        [["chain", "{fp8}"], ["chain", "{next}", "--json"], ["verify", "{fp8}"]],
    ),
    "manifest of a destination": (
        "fp8",
        "daq_manifest.json",
        [["quantize", "{made}/post", "--base", "{made}/base", "--out", "{fp8}", "--dry-run"]],
    ),
    "manifest of a parent": (
        "fp8",
        "daq_manifest.json",
        [
            [
                "quantize",
                "{made}/post",
                "--base",
                "{fp8}",
                "--chain-from",
                "deployed",
                "--out",
                "{made}/out",
                "--dry-run",
            ]
        ],
    ),
    "config": ("post", "config.json", [["quantize", "{post}", *QUANTIZE]]),
    "config of an export": (
        "fp8",
        "config.json",
        [["verify", "{fp8}"], ["inspect", "{fp8}", "--base", "{fp8}", "--post", "{fp8}"]],
    ),
    "config of a base": (
        "fp8",
        "config.json",
        [["quantize", "{made}/post", "--base", "{fp8}", "--out", "{made}/out", *QUICK, "--quiet"]],
    ),
    "index": ("post", "model.safetensors.index.json", [["quantize", "{post}", *QUANTIZE]]),
    "index of an export": ("fp8", "model.safetensors.index.json", [["verify", "{fp8}"], ["chain", "{next}"]]),
    "adapter": (
        "adapter",
        "adapter_config.json",
        [["quantize", "{made}/base", "--adapter", "{adapter}", "--out", "{made}/out", *QUICK, "--quiet"]],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_hostile_file_ends_in_a_clean_error(made, target):
    folder, name, commands = TARGETS[target]
    file, out = made / folder / name, made / "out"
    original = file.read_bytes()
    names = {"made": made} | {name: made / name for name in ("fp8", "next", "post", "adapter")}

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations(json.loads(original)))
    def run(content):
        if target.startswith("manifest"):
            content = signed(content)
        file.write_bytes(as_bytes(content))
        for command in commands:
            check(
                [part.format(**names) for part in command],
                {DONE, REFUSED, PROBLEMS} if command[0] != "quantize" else {DONE, REFUSED},
            )
            shutil.rmtree(out, ignore_errors=True)

    try:
        run()
    finally:
        file.write_bytes(original)


CASES = {
    "a report that is a list": ("fp8/daq_report.json", b"[]", "inspect {made}/fp8", REFUSED),
    "an empty report": ("fp8/daq_report.json", b"{}", "verify {made}/fp8", PROBLEMS),
    "no report": ("fp8/daq_report.json", None, "verify {made}/fp8", PROBLEMS),
    "files as a list": (
        "fp8/daq_manifest.json",
        lambda x: signed(x | {"files": []}),
        "chain {made}/fp8",
        PROBLEMS,
    ),
    "files outside": (
        "fp8/daq_manifest.json",
        lambda x: signed(x | {"files": {"../../x": {"size": 1, "sha256": ""}}}),
        "chain {made}/fp8",
        PROBLEMS,
    ),
    "a list of ignored modules that is no list": (
        "fp8/config.json",
        lambda x: (
            x | {"quantization_config": x["quantization_config"] | {"ignore": 5, "modules_to_not_convert": 5}}
        ),
        "verify {made}/fp8",
        PROBLEMS,
    ),
    "an ignored pattern that is none": (
        "fp8/config.json",
        lambda x: x | {"quantization_config": x["quantization_config"] | {"ignore": ["re:("]}},
        "verify {made}/fp8",
        PROBLEMS,
    ),
    "an ignored pattern that explodes": (
        "fp8/config.json",
        lambda x: (
            x
            | {
                "quantization_config": x["quantization_config"]
                | {"ignore": ["re:(.*.*)*(a|aa|[a-z])*\\d\\d$"]}
            }
        ),
        "verify {made}/fp8",
        PROBLEMS,
    ),
    "rank_pattern as a list": (
        "adapter/adapter_config.json",
        lambda x: x | {"rank_pattern": ["q_proj"]},
        "quantize {made}/base --adapter {made}/adapter --out {made}/out",
        REFUSED,
    ),
    "rank_pattern that explodes": (
        "adapter/adapter_config.json",
        lambda x: x | {"rank_pattern": {"((([a-z_.0-9]+)*)*)*X": 2}},
        "quantize {made}/base --adapter {made}/adapter --out {made}/out",
        REFUSED,
    ),
    "alpha_pattern that is no pattern": (
        "adapter/adapter_config.json",
        lambda x: x | {"alpha_pattern": {"(": 2}},
        "quantize {made}/base --adapter {made}/adapter --out {made}/out",
        REFUSED,
    ),
    "an index without an object of metadata": (
        "fp8/model.safetensors.index.json",
        lambda x: x | {"metadata": [1]},
        "verify {made}/fp8",
        PROBLEMS,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_found_by_hand_has_the_documented_exit_code(made, case):
    name, change, command, code = CASES[case]
    file = made / name
    original = file.read_bytes()
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change if isinstance(change, bytes) else as_bytes(change(json.loads(original))))
    try:
        assert check(command.format(made=made).split(), {code}) == code
    finally:
        file.write_bytes(original)
    assert not (made / "out").exists()
