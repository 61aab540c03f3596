"""Every rule of every format notices when one thing is damaged."""

import shutil

import pytest
import tiny_models
import torch
from test_verify import edit_json, edit_tensors, failed, moved, replaced, with_value

from daq_lightning import ScaleSearch, export_checkpoint
from daq_lightning.audit.verify import run_checks

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
PARTS, VALUES = {"one scale per weight"}, {"scale values"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A clean export of a scheme, made once."""
    folder, made = tmp_path_factory.mktemp("schemes"), {}
    base, post = tiny_models.make_pair(folder, lambda: tiny_models.llama(num_hidden_layers=1))

    def get(scheme):
        if scheme not in made:
            made[scheme] = folder / scheme
            search = ScaleSearch(n_coarse=2, n_fine=0)
            export_checkpoint(post, base, made[scheme], scheme=scheme, search=search)
        return made[scheme]

    return get


def without(name):
    return lambda tensors: tensors.pop(name)


def as_bfloat16(name):
    def change(tensors):
        for part in [part for part in tensors if part.startswith(name)]:
            del tensors[part]
        tensors[name] = torch.zeros(256, 128).bfloat16()

    return change


DAMAGES = {
    "no scale": ("W4A16", without(f"{Q}_scale"), PARTS),
    "no shape": ("W4A16", without(f"{Q}_shape"), PARTS),
    "no global scale": ("NVFP4A16", without(f"{Q}_global_scale"), PARTS),
    "no codes": ("MXFP4A16", without(f"{Q}_packed"), {*PARTS, "complete", "ignore list", "report"}),
    "codes of another packing": ("MXFP4A16", replaced(f"{Q}_packed", lambda t: t.view(torch.int32)), PARTS),
    "rows cut off": (
        "W4A16",
        replaced(f"{Q}_packed", lambda t: t[:-8].contiguous()),
        {*PARTS, "packed codes"},
    ),
    "columns cut off": (
        "W4A16",
        replaced(f"{Q}_packed", lambda t: t[:, :-1].contiguous()),
        {"packed codes", "sizes fit the blocks"},
    ),
    "codes not packed": ("W4A16", moved(f"{Q}_packed", Q), None),
    "scales in float32": ("W4A16", replaced(f"{Q}_scale", torch.Tensor.float), PARTS),
    "exponents as numbers": ("MXFP8", replaced(f"{Q}_scale", torch.Tensor.float), PARTS),
    "E4M3 scales in float32": ("NVFP4A16", replaced(f"{Q}_scale", torch.Tensor.float), PARTS),
    "scales of other groups": ("MXFP4A16", replaced(f"{Q}_scale", lambda t: t.repeat(1, 2)), PARTS),
    "a global scale per row": (
        "NVFP4A16",
        replaced(f"{Q}_global_scale", lambda t: t.repeat(256)),
        {*PARTS, "fused projections"},
    ),
    "zero points of a symmetric scheme": (
        "W4A16",
        lambda tensors: tensors.update({f"{Q}_zero_point": torch.zeros(32, 1, dtype=torch.int32)}),
        PARTS,
    ),
    "no zero points": ("W4A16_ASYM", without(f"{Q}_zero_point"), PARTS),
    "zero points not packed": (
        "W4A16_ASYM",
        replaced(f"{Q}_zero_point", lambda t: t.repeat_interleave(8, 0)),
        {*PARTS, "packed codes"},
    ),
    "orphan": ("W8A8", lambda tensors: tensors.update({"x.weight_zero_point": torch.ones(1)}), PARTS),
    "shape of another weight": ("W4A16", replaced(f"{Q}_shape", lambda t: t + 8), {"packed codes"}),
    "scale NaN": ("W8A8", with_value(f"{Q}_scale", float("nan")), VALUES),
    "scale zero": ("W4A16", with_value(f"{Q}_scale", 0.0), VALUES),
    "E4M3 scale NaN": ("NVFP4A16", with_value(f"{Q}_scale", float("nan")), VALUES),
    "E4M3 scale negative": ("NVFP4A16", with_value(f"{Q}_scale", -1.0), VALUES),
    "exponent NaN": ("MXFP4A16", with_value(f"{Q}_scale", 255), VALUES),
    "exponent NaN of FP8": ("MXFP8", with_value(f"{Q}_scale", 255), VALUES),
    "global scale zero": (
        "NVFP4A16",
        with_value(f"{Q}_global_scale", 0.0),
        {*VALUES, "fused projections"},
    ),
    "global scale infinite": (
        "NVFP4A16",
        with_value("model.layers.0.mlp.down_proj.weight_global_scale", float("inf")),
        VALUES,
    ),
    "global scales differ": (
        "NVFP4A16",
        replaced(f"{Q}_global_scale", lambda t: t * 2),
        {"fused projections"},
    ),
    "code NaN": (
        "MXFP8",
        replaced(Q, lambda t: t.view(torch.uint8).fill_(0x7F).view(t.dtype)),
        {"finite values"},
    ),
    "half of a fused projection": (
        "W4A16",
        as_bfloat16(UP),
        {"fused projections", "ignore list", "report"},
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_found_by_the_right_check(exported, tmp_path, damage):
    scheme, change, expected = DAMAGES[damage]
    folder = shutil.copytree(exported(scheme), tmp_path / "out")
    edit_tensors(folder, change)
    found = failed(folder)
    assert found >= PARTS if expected is None else found == expected


def test_the_config_of_another_scheme_is_found(exported, tmp_path):
    def weights(config):
        return config["quantization_config"]["config_groups"]["group_0"]["weights"]

    folder = shutil.copytree(exported("W4A16"), tmp_path / "size")
    edit_json(folder, "config.json", lambda config: weights(config).update(group_size=64))
    assert failed(folder) == {"one scale per weight", "report"}
    folder = shutil.copytree(exported("W4A16"), tmp_path / "strategy")
    edit_json(folder, "config.json", lambda config: weights(config).update(strategy="tensor"))
    assert failed(folder) == {"config.json", "report"}
    folder = shutil.copytree(exported("W4A16"), tmp_path / "zero")
    edit_json(folder, "config.json", lambda config: weights(config).update(symmetric=False))
    assert "one scale per weight" in failed(folder)


def test_bits_behind_the_last_zero_point_are_found(exported, tmp_path):
    """Rows are taken away that the zero points still have bits of."""
    folder = shutil.copytree(exported("W4A16_ASYM"), tmp_path / "out")
    assert failed(folder) == set()

    def cut(tensors):
        tensors[f"{Q}_packed"] = tensors[f"{Q}_packed"][:-4].contiguous()
        tensors[f"{Q}_scale"] = tensors[f"{Q}_scale"][:-4].contiguous()
        tensors[f"{Q}_shape"] = torch.tensor([252, 128])
        tensors[f"{Q}_zero_point"] |= -(1 << 31)

    edit_tensors(folder, cut)
    [problem] = [
        problem for check in run_checks(folder) if check.name == "packed codes" for problem in check.problems
    ]
    assert "behind the last of 252 rows" in problem
