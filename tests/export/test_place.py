"""Exports to other file systems: uploaded whole or not at all, in place of nothing but an export.

The file systems are fsspec's own in memory and, where `moto[server]` and `s3fs` are installed, an object
store that speaks S3.
"""

import json
import tempfile
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
import tiny_models

from daq_lightning import CheckpointError, ScaleSearch, export_checkpoint
from daq_lightning.audit.verify import verify_checkpoint
from daq_lightning.checkpoint.folder import MANIFEST
from daq_lightning.checkpoint.remote import MARKER, Remote
from daq_lightning.cli import main

QUICK = ScaleSearch(n_coarse=2, n_fine=1)
OPTIONS = ["--quiet", "--n-coarse", "2", "--n-fine", "1"]
NOT_EQUAL = {MANIFEST, "recipe.yaml"}  # which hold paths


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return tiny_models.make_pair(folder, lambda: tiny_models.llama(num_hidden_layers=1))


@pytest.fixture(scope="module")
def local(pair, tmp_path_factory):
    """The same export in a folder."""
    base, post = pair
    out = tmp_path_factory.mktemp("local") / "fp8"
    export_checkpoint(post, base, out, search=QUICK)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def object_store():
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def place(request, monkeypatch):
    """A folder that does not exist yet, on a file system of its own."""
    if request.param == "s3":
        settings = {"endpoint_url": request.getfixturevalue("object_store"), "key": "key", "secret": "secret"}
        monkeypatch.setitem(fsspec.config.conf, "s3", settings)
        fsspec.filesystem("s3").mkdir(f"bucket-{(name := uuid4().hex)}")
        return f"s3://bucket-{name}/runs/fp8"
    return f"memory://{uuid4().hex}/runs/fp8"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, by TMPDIR."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def read(url):
    """Name -> bytes of all files, by fsspec itself."""
    files, root = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    return {path[len(root) + 1 :]: files.cat_file(path) for path in files.find(root)}


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def download(url, folder):
    for name, content in read(url).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_an_export_arrives_whole_with_its_manifest_last(pair, local, place, temporary, tmp_path, monkeypatch):
    base, post = pair
    written, original = [], Remote._put

    def put(self, file, name):
        written.append(name)
        original(self, file, name)

    monkeypatch.setattr(Remote, "_put", put)
    report = export_checkpoint(post, base, place, search=QUICK)
    assert report.path == place
    there = read(place)
    assert set(there) == set(local)
    assert {name for name in there if there[name] != local[name]} <= NOT_EQUAL
    assert written[-1] == MANIFEST
    assert len(written) == len(set(written))
    copy = download(place, tmp_path / "copy")
    assert verify_checkpoint(copy) == []
    assert files_in(temporary) == []


def test_the_command_exports_there_and_says_so(pair, place, temporary, capsys):
    base, post = pair
    arguments = ["quantize", str(post), "--base", str(base), "--out", place, *OPTIONS]
    assert main([*arguments, "--dry-run"]) == 0
    assert read(place) == {}
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == place
    assert MANIFEST in read(place)
    for command in (["verify", place], ["inspect", place], ["quantize", place, "--base", base, "--dry-run"]):
        assert main(list(map(str, command))) == 1
        assert "not on this machine" in capsys.readouterr().err


def test_an_upload_that_fails_anywhere_leaves_no_manifest_and_is_made_up_for(
    pair, local, place, temporary, monkeypatch
):
    base, post = pair
    original = Remote._put
    for fails_at in range(2, 3 + len(local)):  # the first file is the look whether it can be written at all
        left = fails_at

        def put(self, file, name):
            nonlocal left
            left -= 1
            if not left:
                raise TimeoutError("the connection is gone")
            original(self, file, name)

        monkeypatch.setattr(Remote, "_put", put)
        with pytest.raises(CheckpointError, match="the connection is gone") as caught:
            export_checkpoint(post, base, place, search=QUICK, resume=fails_at > 2)
        assert MANIFEST not in read(place)
        [kept] = [path.parent for path in temporary.rglob(MANIFEST)]
        assert str(kept) in str(caught.value)
        # nothing is searched again
        monkeypatch.setattr("daq_lightning.export.run._write_tensors", None)
    monkeypatch.setattr(Remote, "_put", original)
    export_checkpoint(post, base, place, search=QUICK, resume=True)
    there = read(place)
    assert set(there) == set(local)
    assert {name for name in there if there[name] != local[name]} <= NOT_EQUAL
    assert files_in(temporary) == []


def test_what_was_not_uploaded_counts_only_for_the_same_export(pair, place, temporary, monkeypatch):
    base, post = pair
    original = Remote.upload

    def failing(*_):
        raise CheckpointError("no connection.")

    for change in ("another search", "a damaged file"):
        monkeypatch.setattr(Remote, "upload", failing)
        with pytest.raises(CheckpointError, match="--resume"):
            export_checkpoint(post, base, place, search=QUICK)
        [file] = temporary.rglob("model.safetensors")
        if change == "a damaged file":
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        monkeypatch.setattr(Remote, "upload", original)
        search = ScaleSearch(n_coarse=2, n_fine=2) if change == "another search" else QUICK
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr("daq_lightning.export.run._write_tensors", None)
            export_checkpoint(post, base, place, search=search, resume=True)
        export_checkpoint(post, base, place, search=search, resume=True)
        assert files_in(temporary) == []


def test_an_earlier_export_is_replaced_and_no_file_of_it_remains(pair, local, place, temporary):
    base, post = pair
    export_checkpoint(post, base, place, search=QUICK, max_shard_bytes=20_000)
    assert len(read(place)) > len(local)
    export_checkpoint(post, base, place, search=QUICK)
    assert set(read(place)) == set(local)


@pytest.mark.parametrize("name", ["notes.txt", "deep/er/notes.txt", "README.md"])
def test_what_is_of_others_is_never_replaced(pair, local, temporary, name):
    base, post = pair
    for earlier in (False, True):
        url = f"memory://{uuid4().hex}/fp8"
        if earlier:
            export_checkpoint(post, base, url, search=QUICK)
        files, root = fsspec.core.url_to_fs(url)
        files.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        files.pipe_file(f"{root}/{name}", b"mine")
        before = read(url)
        with pytest.raises(CheckpointError, match=f"holds {name}"):
            export_checkpoint(post, base, url, search=QUICK)
        assert read(url) == before


def test_a_file_that_came_while_it_was_exported_stays(pair, temporary, monkeypatch):
    base, post = pair
    url = f"memory://{uuid4().hex}/fp8"
    original = Remote.upload

    def upload(self, folder):
        fsspec.filesystem("memory").pipe_file(f"{url}/notes.txt", b"mine")
        original(self, folder)

    monkeypatch.setattr(Remote, "upload", upload)
    with pytest.raises(CheckpointError, match=r"holds notes\.txt"):
        export_checkpoint(post, base, url, search=QUICK)
    assert read(url) == {"notes.txt": b"mine"}


def test_a_file_that_arrives_cut_off_is_found(pair, place, temporary, monkeypatch):
    base, post = pair
    files, _ = fsspec.core.url_to_fs(place)  # there is one for all
    original = files.put_file

    def cut(local, remote, **options):
        if remote.endswith("safetensors"):
            short = Path(local).with_name("short")
            short.write_bytes(Path(local).read_bytes()[:-1])
            local = str(short)
        return original(local, remote, **options)

    monkeypatch.setattr(files, "put_file", cut)
    with pytest.raises(CheckpointError, match=r"model.safetensors has \d+ bytes there, and \d+ here"):
        export_checkpoint(post, base, place, search=QUICK)
    assert MARKER in read(place)
    assert MANIFEST not in read(place)


def test_a_missing_package_is_named_before_anything_is_read(pair, temporary, capsys):
    base, post = pair
    for url, named in (("oci://bucket@space/fp8", "ocifs"), ("nonsense://bucket/fp8", "nonsense")):
        assert main(["quantize", str(post), "--base", str(base), "--out", url, *OPTIONS]) == 1
        assert named in capsys.readouterr().err
    assert files_in(temporary) == []


def test_a_place_that_cannot_be_written_is_named_before_a_weight_is_read(pair, temporary, monkeypatch):
    base, post = pair
    memory = fsspec.filesystem("memory")

    def failing(*_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr("daq_lightning.export.place.Place.export", None)
    for name, message in (("put_file", "cannot be written"), ("find", "cannot be reached")):
        monkeypatch.setattr(memory, name, failing)
        with pytest.raises(CheckpointError, match=rf"{message}: PermissionError: Access Denied"):
            export_checkpoint(post, base, f"memory://{uuid4().hex}/fp8", search=QUICK)


def test_a_folder_for_temporary_files_that_others_can_write_is_refused(pair, temporary):
    base, post = pair
    url = f"memory://{uuid4().hex}/fp8"
    export_checkpoint(post, base, url, search=QUICK)
    [root] = temporary.iterdir()
    root.chmod(0o777)
    with pytest.raises(CheckpointError, match="TMPDIR"):
        export_checkpoint(post, base, url, search=QUICK)


def test_a_file_url_is_a_local_path(pair, local, tmp_path):
    base, post = pair
    export_checkpoint(post, base, f"file://{tmp_path}/fp8", search=QUICK)
    assert {path.name: path.read_bytes() for path in (tmp_path / "fp8").iterdir()}.keys() == local.keys()
