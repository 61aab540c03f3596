"""The model card of an export: what the Hub reads in it, what stays of an existing one, and what foreign text
cannot do to it."""

import shutil

import pytest
import tiny_models
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file, save_file

from daq_lightning import DeltaAwareQuantization, ScaleSearch, export_checkpoint
from daq_lightning.model.hub import repository_of
from daq_lightning.report.card import BEGIN, END
from daq_lightning.report.front_matter import merge, split_card

QUICK = ScaleSearch(n_coarse=2, n_fine=0)
OURS = """---
# by hand
license: apache-2.0
language: no
base_model: org/base-1B
base_model_relation: finetune
tags:
- chat
# scores
model-index:
- name: ours
  results: []
---
# Our model

It is *good*.
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_models.make_pair(
        tmp_path_factory.mktemp("pair"), lambda: tiny_models.llama(num_hidden_layers=1)
    )


@pytest.fixture
def post(pair, tmp_path):
    """A fine-tuned model that a test may change."""
    return shutil.copytree(pair[1], tmp_path / "post")


def card_of(post, base, out, **options):
    """The bytes of a card, and what huggingface_hub reads in it, checked without the Hub."""
    export_checkpoint(post, base, out, search=QUICK, **options)
    card = ModelCard.load(out / "README.md", ignore_metadata_errors=False)
    assert card.data.base_model_relation == "quantized"
    named = card.data.base_model or []
    for name in [named] if isinstance(named, str) else named:
        validate_repo_id(name)
    for tags in (card.data.tags, card.data.language or []):
        assert all(isinstance(tag, str) for tag in tags)
    assert card.text.count(BEGIN) == card.text.count(END) == 1
    return (out / "README.md").read_bytes(), card


def test_a_card_says_what_the_hub_needs_and_what_a_person_needs(pair, tmp_path):
    report = export_checkpoint(pair[1], pair[0], tmp_path / "named", search=QUICK, scheme="FP8_BLOCK")
    text, card = card_of(pair[1], pair[0], tmp_path / "out", scheme="FP8_BLOCK")
    assert card.data.to_dict() == {
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "quantized_by": "daq-lightning",
        "tags": ["fp8", "quantized", "vllm", "daq-lightning"],
    }
    for said in ("7 weights", "vllm serve", "sglang", "from_pretrained", "--config recipe.yaml", "E8M0"):
        assert said in card.text
    assert "output head: 1 (lm_head.weight)" in card.text
    for side in ("absmax", "searched", "dequantized"):
        assert f"| {report.metrics(side)['cosine']:.4f} |" in card.text
    assert str(tmp_path) not in card.text
    assert text == (tmp_path / "named" / "README.md").read_bytes()  # the same under any name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheme": "FP8_DYNAMIC"}, "casts the scales to bfloat16"),
        ({"scheme": "FP8_DYNAMIC", "scale_format": "ue8m0"}, "powers of two, which no server changes"),
        ({"scheme": "FP8_BLOCK"}, "both keep the float32 scales"),
        ({"scheme": "FP8A16"}, "activations: 16 bit"),
    ],
)
def test_a_card_says_which_servers_keep_its_scales(pair, tmp_path, options, said):
    _, card = card_of(pair[1], pair[0], tmp_path / "out", **options)
    assert said in card.text
    warned = "which undoes the search" in card.text
    assert warned == (options["scheme"] == "FP8_BLOCK")
    assert ("compressed-tensors" in card.data.tags) == (options["scheme"] != "FP8_BLOCK")


def test_an_existing_card_is_kept_and_appended_to(pair, post, tmp_path):
    (post / "README.md").write_text(OURS)
    text, card = card_of(post, pair[0], tmp_path / "out")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == "org/base-1B"
    assert data["tags"][:2] == ["chat", "fp8"]
    front, body = split_card(text.decode())
    for line in ("# by hand", "language: no", "# scores", "model-index:", "  results: []"):
        assert line in front.splitlines()
    assert body.startswith("\n# Our model\n\nIt is *good*.\n\n" + BEGIN)
    assert "written for the model before it was quantized" in body


def test_another_export_of_an_export_writes_its_own_part_anew(pair, post, tmp_path):
    (post / "README.md").write_text(OURS)
    first, _ = card_of(post, pair[0], tmp_path / "first", scheme="FP8_BLOCK")
    second, card = card_of(tmp_path / "first", pair[0], tmp_path / "second", scheme="FP8_DYNAMIC")
    assert b"FP8_BLOCK" in first
    assert "FP8_BLOCK" not in card.text
    assert card.text.count("# Our model") == 1
    (tmp_path / "first" / "README.md").write_bytes(first + b"Added below.\n")
    _, card = card_of(tmp_path / "first", pair[0], tmp_path / "third", scheme="FP8_DYNAMIC")
    assert card.text.index("It is *good*.") < card.text.index("Added below.") < card.text.index(BEGIN)


def test_a_marker_without_its_end_deletes_nothing(pair, post, tmp_path):
    (post / "README.md").write_text(f"{BEGIN}\nMine.\n")
    export_checkpoint(post, pair[0], tmp_path / "out", search=QUICK)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Mine." in text
    assert text.count(END) == 1


def test_a_published_model_is_named_before_its_base(pair, tmp_path):
    folders = []
    for folder, name in zip(pair, ("models--org--base", "models--org--tuned-1B"), strict=True):
        folders.append(tmp_path / "hub" / name / "snapshots" / "0123abc")
        shutil.copytree(folder, folders[-1])
    (folders[0] / "README.md").write_text("---\nlicense: llama3\nlanguage: [de, en]\ntags: [x]\n---\n")
    _, card = card_of(folders[1], folders[0], tmp_path / "both")
    assert card.data.base_model == ["org/tuned-1B"]
    assert (card.data.license, card.data.language) == ("llama3", ["de", "en"])  # of the base
    assert "x" not in card.data.tags
    assert "# FP8 of org/tuned-1B" in card.text
    _, card = card_of(pair[1], folders[0], tmp_path / "one")
    assert card.data.base_model == ["org/base"]


def test_a_local_path_is_never_named_as_the_base_model(pair, post, tmp_path):
    named = (
        "base_model: /home/me/secret\nlibrary_name: peft\ntags: ['base_model:adapter:/home/me/secret', a]\n"
    )
    (post / "README.md").write_text(f"---\n{named}---\n")
    text, card = card_of(post, pair[0], tmp_path / "out")
    assert b"secret" not in text
    assert card.data.base_model is None
    assert card.data.library_name == "transformers"


@pytest.mark.parametrize(
    "front",
    [
        "license: [\n",
        "{license: mit}\n",
        "- a list\n",
        "a: 1\na: 2\n",
        "a: &x [1]\ntags: &y [b]\nc: *y\n",
        "? {complex: key}\n: value\n",
        "a: \x00\n",
        "a: " + "[" * 3000 + "\n",
        "a: !!python/object/apply:os.system ['true'\n",
        "a: b\n--- \nc: d\n...\n",
    ],
)
def test_metadata_that_cannot_be_read_stays_as_text(pair, post, tmp_path, front):
    (post / "README.md").write_text(f"---\n{front}---\n# Title\n")
    text, card = card_of(post, pair[0], tmp_path / "out")
    assert "# Title" in card.text
    assert card.data.license is None
    assert front.encode().rstrip() in text or front.startswith("a: b")


def test_bytes_that_are_no_utf8_stay_as_they_are(pair, post, tmp_path):
    (post / "README.md").write_bytes(b"---\nlicense: mit\n---\nna\xefve\r\n")
    export_checkpoint(post, pair[0], tmp_path / "out", search=QUICK)
    text = (tmp_path / "out" / "README.md").read_bytes()
    assert b"na\xefve\r\n" in text
    assert b"license: mit\n" in text


def test_a_card_that_links_out_of_its_folder_is_refused(pair, post, tmp_path):
    (tmp_path / "private").write_text("secret")
    (post / "README.md").symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match="link out of its folder"):
        export_checkpoint(post, pair[0], tmp_path / "out", search=QUICK)
    assert not (tmp_path / "out").exists()


def test_names_are_shown_and_do_nothing(tmp_path):
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    names = [f"x{END}![a](http://b)|<script>\ud800", "y`*z*`\n# Title"]
    weights = {f"{name}.weight": weight * 1.01 for name in names} | {f"{names[0]}.norm": weight[0]}
    base = {f"{name}.weight": weight for name in names[1:]}
    text, card = card_of(weights, base, tmp_path / "out", missing_base="absmax")
    assert "<script>" not in card.text.replace("\\<script\\>", "")
    assert "\n# Title" not in card.text
    assert b"config.json" in text
    assert "export_checkpoint(" in card.text
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_an_adapter_brings_its_own_card(pair, tmp_path):
    import peft
    import transformers

    base = shutil.copytree(pair[0], tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n# The base\n")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("---\nlibrary_name: peft\n---\n# The adapter\n")
    text, card = card_of(base, base, tmp_path / "out", adapter=tmp_path / "adapter")
    assert "# The adapter" in card.text
    assert b"The base" not in text
    assert card.data.license == "mit"
    assert card.data.library_name == "transformers"


def test_a_trainer_leaves_the_callback_in_the_card_and_no_recipe(tmp_path):
    from live import fit

    callback = DeltaAwareQuantization(dirpath=str(tmp_path / "exports"), search=QUICK)
    fit(tmp_path, callback)
    out = callback.exports[0]
    card = ModelCard.load(out / "README.md")
    assert "DeltaAwareQuantization(\n" in card.text
    assert card.data.pipeline_tag == "text-generation"
    assert not (out / "recipe.yaml").exists()
    assert str(tmp_path) not in (out / "README.md").read_text()


def test_only_the_lines_of_replaced_keys_change():
    front = "a: 1 # one\ntags:\n  - x\n\n# below\nb: |\n  text\n\nbase_model_relation: finetune\nc:\n"
    merged = merge(front, {"tags": ["y"], "a": 2, "c": 3, "d": "no"}, {"tags", "base_model_relation"})
    assert merged == "a: 1 # one\n\n# below\nb: |\n  text\n\ntags:\n- y\nc: 3\nd: 'no'\n"
    assert merge("", {"a": 1}, ()) == "a: 1\n"


def test_a_folder_of_the_hubs_cache_says_its_repository(tmp_path):
    for place, name in {
        "models--org--a--b/snapshots/1": "",
        "models--org--a.b/snapshots/1": "org/a.b",
        "models--gpt2/snapshots/1": "",
        "datasets--org--a/snapshots/1": "",
        "models--org--a/blobs/1": "",
    }.items():
        assert repository_of(tmp_path / place) == name


def test_a_recipe_is_left_out_where_the_command_line_cannot_say_it(pair, tmp_path):
    (tmp_path / "file").mkdir()
    save_file(load_file(pair[0] / "model.safetensors"), tmp_path / "file" / "base.safetensors")
    export_checkpoint(pair[1], tmp_path / "file" / "base.safetensors", tmp_path / "out", search=QUICK)
    assert not (tmp_path / "out" / "recipe.yaml").exists()
