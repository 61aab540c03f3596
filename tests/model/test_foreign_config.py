"""A config.json is foreign input: nothing it names is run or fetched, and a model far beyond its files is not
built."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
import safetensors.torch
import tiny_models
import torch

from daq_lightning import ScaleSearch, export_checkpoint
from daq_lightning.cli import main

QUICK = ScaleSearch(n_coarse=2, n_fine=1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_models.make_pair(
        tmp_path_factory.mktemp("pair"), lambda: tiny_models.llama(num_hidden_layers=1)
    )


@pytest.fixture(scope="module")
def plain(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "fp8"
    base, post = pair
    export_checkpoint(post, base, out, search=QUICK)
    return safetensors.torch.load_file(out / "model.safetensors")


def with_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


NAMES_CODE = {
    "a kernel": {"attn_implementation": "kernels-community/flash-attn"},
    "a kernel of anybody": {"_attn_implementation": "someone/evil-attention"},
    "a function of a kernel": {"_attn_implementation_internal": "someone/evil:attend"},
    "a kernel per part": {"attn_implementation": {"": "someone/evil", "text_config": "someone/evil"}},
    "an attention that is not installed": {"attn_implementation": "flash_attention_2"},
    "no attention": {"attn_implementation": "nothing"},
    "experts": {"experts_implementation": "someone/evil"},
    "code": {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "someone/evil--model.Model"}},
    "a repository": {"_name_or_path": "someone/evil", "code_revision": "main", "trust_remote_code": True},
    "kernels": {"use_kernels": True, "custom_pipelines": {"x": {"impl": "evil.Pipeline"}}},
}


@pytest.mark.parametrize("case", NAMES_CODE)
def test_nothing_that_a_config_names_is_imported_or_fetched(pair, plain, tmp_path, monkeypatch, case):
    post, trace = shutil.copytree(pair[1], tmp_path / "post"), []
    (post / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Config: pass\n")
    with_config(post, **NAMES_CODE[case])
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: trace.append(address))
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", lambda *a, **k: trace.append(a))
    export_checkpoint(post, pair[0], tmp_path / "fp8", search=QUICK)
    assert trace == []
    assert not (tmp_path / "run").exists()
    stored = safetensors.torch.load_file(tmp_path / "fp8" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {n: t.dtype for n, t in plain.items()}
    assert all(
        torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8))
        for name, tensor in plain.items()
    )


def test_a_backbone_of_the_hub_is_not_asked_for(pair, tmp_path, capsys, monkeypatch):
    post, trace = shutil.copytree(pair[1], tmp_path / "post"), []
    config = {
        "model_type": "detr",
        "architectures": ["DetrModel"],
        "backbone": "someone/evil",
        "use_timm_backbone": False,
    }
    (post / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: trace.append(address) or [][0])
    assert main(["quantize", str(post), "--base", str(pair[0]), "--out", str(tmp_path / "fp8")]) == 1
    assert "cannot build the model" in capsys.readouterr().err
    assert trace == []


ABSURD = {
    "layers": {"num_hidden_layers": 10_000_000},
    "more layers than fit into memory": {"num_hidden_layers": 10**15},
    "layers as a float": {"num_hidden_layers": 1e15},
    "experts": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 10**12},
    "depths": {"model_type": "swin", "architectures": ["SwinModel"], "depths": [10**9, 10**9]},
    "layers by another name": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 10**9},
    "many small modules": {
        "model_type": "hubert", "architectures": ["HubertModel"], "conv_dim": [1] * 50_000,
        "conv_stride": [1] * 50_000, "conv_kernel": [1] * 50_000,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", ABSURD)
def test_a_config_of_far_more_modules_than_the_files_hold_is_refused_at_once(pair, tmp_path, case):
    post = shutil.copytree(pair[1], tmp_path / "post")
    with_config(post, **ABSURD[case])
    command = ["quantize", str(post), "--base", str(pair[0]), "--out", str(tmp_path / "fp8")]
    code = "import sys; from daq_lightning.cli import main; sys.exit(main(sys.argv[1:]))"
    limited = ["bash", "-c", 'ulimit -v 8000000; exec "$0" "$@"', sys.executable, "-c", code]
    run = subprocess.run([*limited, *command], capture_output=True, text=True, timeout=100)
    assert run.returncode == 1, run.stderr
    assert "cannot build the model" in run.stderr
    assert "more than" in run.stderr
    assert not (tmp_path / "fp8").exists()
