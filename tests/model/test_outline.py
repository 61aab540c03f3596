"""The outline of a model: all that plan and checks ask, kept between processes, and never believed without
reason."""

import dataclasses
import json
import shutil
import sys

import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.export.plan import plan_export
from daq_lightning.export.settings import ExportSettings
from daq_lightning.export.source import Source
from daq_lightning.model import from_folder, outline_cache
from daq_lightning.model.architecture import Architecture
from daq_lightning.model.from_folder import FolderModel
from daq_lightning.model.outline_cache import outline_key, read_outline, write_outline

FACTORIES = {
    factory.__name__: factory
    for factory in (
        *(tiny_models.llama, tiny_models.qwen2, tiny_models.gemma3, tiny_models.phi3, tiny_models.gpt2),
        *(tiny_models.qwen3_moe, tiny_models.mixtral, tiny_models.llava, tiny_models.qwen2_vl),
    )
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "daq_lightning"


@pytest.fixture(scope="module", params=FACTORIES)
def folder(request, tmp_path_factory):
    """A folder of each tiny model."""
    folder = tmp_path_factory.mktemp(request.param)
    FACTORIES[request.param]().to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.llama(num_hidden_layers=1).to(torch.bfloat16).save_pretrained(folder)
    return folder


def outline_of(folder, names=None):
    """As a process that has not imported transformers asks."""
    checkpoint = Checkpoint(folder)
    model = FolderModel(folder, len(checkpoint.raw))
    model._may_keep = True
    return model.outline(checkpoint if names is None else names)


def key_of(folder):
    return outline_key(json.loads((folder / "config.json").read_text()), folder.name)


def built(monkeypatch):
    """The folders whose model was built since."""
    seen, build = [], from_folder._build
    monkeypatch.setattr(from_folder, "_build", lambda *args: seen.append(args[1]) or build(*args))
    return seen


def test_an_outline_from_the_cache_is_the_one_that_is_built(folder, monkeypatch):
    seen = built(monkeypatch)
    fresh, kept = outline_of(folder), outline_of(folder)
    assert seen == [folder]
    assert kept == fresh
    assert list(kept.parameters) == list(fresh.parameters)  # in the order in which problems are listed
    source = Source.from_folder(folder)
    assert source.outline == fresh
    assert planned(source, kept) == planned(source, fresh)


def planned(source, outline):
    """The plan, or why there is none (GPT-2 has no Linear weights)."""
    try:
        return plan_export(source.specs, outline, ExportSettings()).to_dict()
    except ValueError as error:
        return str(error)


def test_an_outline_says_of_a_model_what_its_modules_say(folder):
    """Held against the modules themselves, one by one."""
    model = from_folder._build(json.loads((folder / "config.json").read_text()), folder, 10**6).model
    outline = outline_of(folder)
    named = dict(model.named_modules())
    assert outline.modules == set(named)
    assert outline.tensors == set(model.state_dict())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert outline.parameters == {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    assert set(outline.parameters) - set(outline.copies) == {name for name, _ in model.named_parameters()}
    for name, parameter in parameters.items():
        owner = named[name.rpartition(".")[0]]
        role = outline.role(name, 2)
        if isinstance(owner, torch.nn.Linear) and name.endswith(".weight"):
            assert role in ("linear", "router", "head", "outside"), name
        elif "Router" in type(owner).__name__ and name.endswith(".weight"):
            assert role == "router", name
        elif parameter.ndim == 3:
            assert role == "expert", name
        elif type(owner).__name__ == "Conv1D" and name.endswith(".weight"):
            assert role == "conv1d", name
        else:
            assert role == "other", name
        assert outline.role(name, 1) == "other"
        assert outline.role(name, 3) == ("stack" if role == "expert" else "other"), name


def test_an_export_and_another_dtype_have_the_key_of_the_source_and_another_model_has_not(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    key = outline_key(config, "a")
    stored = {
        "quantization_config": {"quant_method": "fp8"},
        "dtype": "float16",
        "transformers_version": "4.0",
    }
    assert outline_key(config | stored, "b") == key
    assert outline_key(dict(reversed(config.items())), "a") == key
    vision = config | {"vision_config": {"dtype": "bfloat16", "depth": 1}}
    assert outline_key(vision, "a") == outline_key(config | {"vision_config": {"depth": 1}}, "a") != key
    for change in (
        {"num_hidden_layers": 3},
        {"architectures": ["LlamaModel"]},
        {"tie_word_embeddings": True},
    ):
        assert outline_key(config | change, "a") != key, change
    unnamed = {name: value for name, value in config.items() if name != "model_type"}
    assert outline_key(unnamed, "llama") != outline_key(
        unnamed, "gpt2"
    )  # transformers looks at the folder's name


def test_other_versions_have_other_keys_and_a_development_version_has_none(llama, monkeypatch):
    config = json.loads((llama / "config.json").read_text())
    keys = {outline_key(config, "a")}
    monkeypatch.setattr(outline_cache.metadata, "version", lambda name: "5.999")
    keys.add(outline_key(config, "a"))
    monkeypatch.setattr(outline_cache.daq_lightning, "__version__", "9")
    keys.add(outline_key(config, "a"))
    monkeypatch.setattr(outline_cache, "_code", lambda: ["changed"])
    keys.add(outline_key(config, "a"))
    assert len(keys) == 4
    monkeypatch.setattr(outline_cache.metadata, "version", lambda name: "5.999.dev0")
    assert outline_key(config, "a") is None


def test_an_unknown_name_is_asked_of_transformers_and_then_known(llama, monkeypatch):
    seen = built(monkeypatch)
    names = list(Checkpoint(llama))
    assert outline_of(llama, names[:3]).keys.keys() == set(names[:3])
    assert outline_of(llama, names[:2]).keys.keys() == set(names[:2])
    assert len(seen) == 1
    assert outline_of(llama, [*names[2:], "foreign"]).keys["foreign"] == "foreign"
    assert len(seen) == 2
    assert outline_of(llama, [*names, "foreign"]) == dataclasses.replace(
        outline_of(llama), keys={name: name for name in [*names, "foreign"]}
    )
    assert len(seen) == 2


def test_the_names_of_an_older_form_are_those_that_transformers_gives_them(tmp_path):
    """Held against transformers itself, which loads the file under these names."""
    folder = tmp_path / "moe"
    tiny_models.mixtral().save_pretrained(folder)
    outline_of(folder)
    names = [name for name in Checkpoint(folder) if ".experts." in name]
    kept = outline_of(folder, names).keys
    assert kept == Architecture(tiny_models.mixtral()).keys_of(names)
    assert {name.rpartition(".")[2] for name in kept.values()} == {"gate_up_proj", "down_proj"}


def test_a_process_that_has_transformers_asks_it_and_keeps_nothing(llama, cache):
    assert "transformers" in sys.modules
    FolderModel(llama, 100).outline([])
    assert not list(cache.glob("outline*")) if cache.exists() else True
    outline = outline_of(llama)
    write_outline(key_of(llama), dataclasses.replace(outline, linear_modules=("wrong",)))
    assert FolderModel(llama, 100).outline(outline.keys) == outline


def test_a_model_with_code_of_others_is_not_kept(llama, cache, monkeypatch):
    class Foreign(torch.nn.Linear):
        __module__ = "timm.layers"

    build = from_folder._build

    def with_foreign(*args):
        architecture = build(*args)
        architecture.model.add_module("foreign", Foreign(2, 2, device="meta"))
        return architecture

    monkeypatch.setattr(from_folder, "_build", with_foreign)
    outline_of(llama)
    assert not list(cache.glob("outline*")) if cache.exists() else True


def test_a_model_beyond_its_files_is_refused_also_if_its_outline_is_known(tmp_path, monkeypatch):
    folder = tmp_path / "many"
    tiny_models.llama(num_hidden_layers=1).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 200}
    (folder / "config.json").write_text(json.dumps(config))
    model = FolderModel(folder, 10**4)
    model._may_keep = True
    assert len(model.outline([]).modules) > 2000
    with pytest.raises(ValueError, match="far more than the tensors in its files"):
        outline_of(folder, [])


@pytest.mark.parametrize(
    "spoil", ["link", "directory", "empty", "half", "number", "writable", "another's", "deep"]
)
def test_what_cannot_be_trusted_is_not_read_and_is_written_anew(llama, cache, tmp_path, spoil, monkeypatch):
    fresh, key = outline_of(llama), key_of(llama)
    (path,) = cache.glob("outline*.json")
    content = path.read_bytes()
    if spoil == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif spoil == "directory":
        path.unlink()
        path.mkdir()
    elif spoil == "writable":
        path.chmod(0o666)
    elif spoil == "another's":  # the entry of another model under this name
        write_outline("0" * 32, dataclasses.replace(fresh, linear_modules=("wrong",)))
        shutil.move(cache / f"outline_{'0' * 32}.json", path)
    else:
        path.write_bytes(
            {"empty": b"", "half": content[: len(content) // 2], "number": b"7", "deep": b"[" * 10**5}[spoil]
        )
    assert read_outline(key) is None
    seen = built(monkeypatch)
    assert outline_of(llama) == fresh
    assert outline_of(llama) == fresh
    assert len(seen) == (2 if spoil == "directory" else 1)


def test_where_nothing_can_be_kept_the_result_is_the_same(llama, cache):
    cache.parent.mkdir()
    cache.write_text("a file in the place of the folder")
    assert outline_of(llama) == outline_of(llama) == Source.from_folder(llama).outline


def mutations(content):
    """An entry with bytes replaced, or with a value of its JSON replaced by another."""

    def replaced(place):
        index, value = place
        return content[:index] + bytes([value]) + content[index + 1 :]

    flipped = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)).map(replaced)
    values = st.one_of(
        st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.lists(st.text(max_size=2))
    )

    def with_value(field, value, inner):
        entry = json.loads(content)
        if inner:
            entry["content"][field] = value
        else:
            entry["content" if field in entry["content"] else field] = value
        return json.dumps(entry).encode()

    fields = sorted(json.loads(content)["content"])
    return st.one_of(flipped, st.builds(with_value, st.sampled_from(fields), values, st.booleans()))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_changed_entry_never_changes_an_outline(llama, cache, data):
    if not list(cache.glob("outline*")):
        outline_of(llama)
    key, path = key_of(llama), next(cache.glob("outline*.json"))
    before, content = read_outline(key), path.read_bytes()
    try:
        path.write_bytes(data.draw(mutations(content)))
        assert read_outline(key) in (None, before)
    finally:
        path.write_bytes(content)
    assert read_outline(key) == before is not None


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_an_entry_of_another_form_is_no_outline_even_with_a_right_digest(llama, cache, data):
    outline, key = outline_of(llama), key_of(llama)
    name = f"outline_{key}"
    content = outline_cache.read_cached(name)
    field = data.draw(st.sampled_from(sorted(set(content) - {"model", "is_transformers"})))
    value = data.draw(st.one_of(st.none(), st.integers(), st.text(), st.lists(st.integers(), min_size=1)))
    outline_cache.write_cached(name, content | {field: value})
    assert read_outline(key) is None
    outline_cache.write_cached(name, {part: value for part, value in content.items() if part != field})
    assert read_outline(key) is None
    write_outline(key, outline)
    assert read_outline(key) == outline
