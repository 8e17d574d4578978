"""Ids of HuggingFace's hub, by its own client and a server that speaks its protocol."""

import json
import logging
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import save

from maect_jax import config as configs
from maect_jax import load_encoder, main, pipeline
from maect_jax.convert import hub, names, tensors
from maect_jax.errors import UserError
from maect_jax.models import vit
from maect_jax.run import lineage
from tests.helpers import CONFIGS, SMALL
from tests.helpers.common import run_on
from tests.helpers.foreign_files import run_convert
from tests.helpers.hub import TOKEN, serving

client = pytest.importorskip("huggingface_hub", reason="the extra [hub] is not installed")
constants = pytest.importorskip("huggingface_hub.constants")
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = "model.safetensors"
JUNK = {"README.md": b"# A model", "pytorch_model.bin": b"\x80\x02", "tf_model.h5": b"\x89HDF"}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """An empty hub, for the client of this process, with an empty cache and no token."""
    with serving() as served:
        url = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield served
        client.close_session()


@pytest.fixture
def offline(monkeypatch):
    """Makes the client believe that there is no network."""
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def model(seed=0, **about):
    """The files of a tiny encoder of the packaged images, whose sizes only its config states."""
    module = vit.ViT(width=32, depth=2, heads=2, patch_size=7)
    params = jax.jit(module.init)(jax.random.key(seed), np.zeros((1, 28, 28, 1)))["params"]
    encoder = names.encoder_to_torch(jax.device_get(params), 7, (4, 4))
    weights = save({name: np.ascontiguousarray(x) for name, x in encoder.items()})
    stated = {"num_attention_heads": 2, "layer_norm_eps": 1e-6} | about
    processor = {"image_mean": [0.25], "image_std": [0.5]}
    return {
        CONFIG: json.dumps(stated).encode(),
        PROCESSOR: json.dumps(processor).encode(),
        WEIGHTS: weights,
    }


def test_an_id_is_the_folder_that_it_names(server, tmp_path, monkeypatch, rng):
    files = model()
    commit = server.commit("org/vit.tiny", files | JUNK)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    images = rng.integers(0, 256, (2, 28, 28, 1), dtype=np.uint8)
    encoder, want = load_encoder("hf://org/vit.tiny"), load_encoder(tmp_path)
    np.testing.assert_array_equal(encoder(images), want(images))
    assert (encoder.mean, encoder.std) == ((0.25,), (0.5,))
    assert sorted(server.sent) == sorted(files)  # and nothing else
    run, out = tmp_path / "run", tmp_path / "out.safetensors"
    run_convert(monkeypatch, "import", "hf://org/vit.tiny", run)
    assert sorted(server.sent) == sorted(files)  # it was in the cache
    (origin,) = lineage.read_lineage(run)
    exact = f"hf://org/vit.tiny@{commit}/{WEIGHTS}"
    assert (origin["file"], origin["named"]) == (exact, "hf://org/vit.tiny")
    assert configs.read(run / CONFIG).name == "vit.tiny"
    run_convert(monkeypatch, "export", run, out, "--format=timm")
    assert f"`{exact}`" in out.with_name("out.safetensors.md").read_text()
    run_convert(monkeypatch, "export", run, tmp_path / "hf", "--format=hf")
    head = (tmp_path / "hf/README.md").read_text().split("---")[1]
    assert yaml.safe_load(head)["base_model"] == ["org/vit.tiny"]
    # What the card says gets the same, without a question to the hub.
    before = server.asked
    np.testing.assert_array_equal(load_encoder(exact)(images), want(images))
    assert server.asked == before


def test_a_run_stays_with_the_commit_that_it_started_from(server, tmp_path, monkeypatch):
    first = server.commit("org/vit", model())
    settings = (
        "init_from=hf://org/vit", "eval.protocols=('knn',)", SMALL,
        "data.val_split=train[80%:]", "monitor.every=0", "data.mean=(0.25,)", "data.std=(0.5,)",
        "eval.map=pca",
    )  # fmt: skip

    def run(workdir):
        config = configs.load(str(CONFIGS / "eval.py:test"), settings)
        run_on(monkeypatch, (1, 1), config, tmp_path / workdir, report=False)
        (origin,) = json.loads((tmp_path / workdir / "origin.json").read_text())["from"]
        return origin

    origin = run("old")
    assert origin["file"] == f"hf://org/vit@{first}/{WEIGHTS}"
    assert list(json.loads((tmp_path / "old/results.json").read_text())) == ["vit"]
    second = server.commit("org/vit", model(seed=1))
    server.asked = 0
    assert run("old") == origin
    shutil.rmtree(tmp_path / "cache")  # it is fetched anew, by its commit
    assert run("old") == origin
    # Another run takes what is there now.
    config = configs.load(str(CONFIGS / "eval.py:test"), settings)
    assert f"hf://org/vit@{second}/" in str(pipeline.prepare(config, tmp_path / "new"))


# Files of a repository, what of them an id names, the one with the weights, and the model's name.
CHOICES = {
    "safetensors first": ((WEIGHTS, "pytorch_model.bin"), "", WEIGHTS, "vit"),
    "a pickle": (("pytorch_model.bin", CONFIG), "", "pytorch_model.bin", "vit"),
    "the only one": (("vit_b.pth", CONFIG), "", "vit_b.pth", "vit_b"),
    "the only safe one": (("a.pth", "b.pth", "a.safetensors"), "", "a.safetensors", "a"),
    "by name": (("a.pth", "b.pth"), "/b.pth", "b.pth", "b"),
    "a folder": (("a/" + WEIGHTS, "b/" + WEIGHTS), "/b", "b/" + WEIGHTS, "vit"),
    "in a folder": (("a/x.pth", "a/y.pth"), "/a/y.pth", "a/y.pth", "y"),
}


@pytest.mark.parametrize(("files", "path", "want", "name"), CHOICES.values(), ids=list(CHOICES))
def test_the_file_with_the_weights(server, monkeypatch, files, path, want, name):
    monkeypatch.setattr(tensors, "import_torch", lambda _: None)  # which only reading needs
    commit = server.commit("org/vit", {file: file.encode() for file in files}, "br/anch")
    for revision in ("br%2Fanch", commit):
        found = hub.fetch(f"hf://org/vit@{revision}{path}")
        assert found.id == f"hf://org/vit@{commit}/{want}"
        assert found.path.read_bytes() == want.encode()
        assert found.name == name


def test_a_pickle_is_not_downloaded_where_nothing_can_read_it(server, monkeypatch):
    server.commit("org/vit", {"pytorch_model.bin": b"x", CONFIG: b"{}"})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"hf://org/vit: pytorch_model\.bin: needs .*\[torch\]"):
        hub.fetch("hf://org/vit")
    assert server.sent == []


def test_parts_and_a_download_that_breaks_off(server):
    parts = {f"model-{i}-of-2.safetensors": save({f"x{i}": np.ones(9)}) for i in (1, 2)}
    index = {"weight_map": {f"x{i}": f"model-{i}-of-2.safetensors" for i in (1, 2)}}
    files = {**parts, f"{WEIGHTS}.index.json": json.dumps(index).encode()}
    server.commit("org/large", files | JUNK)
    server.cut = 1
    found = hub.fetch("hf://org/large")
    assert {name: found.path.with_name(name).read_bytes() for name in files} == files
    assert set(server.sent) == set(files)
    # An index may name what is elsewhere on the machine.
    index["weight_map"]["x1"] = "../../x.safetensors"
    server.commit("org/large", {f"{WEIGHTS}.index.json": json.dumps(index).encode()})
    with pytest.raises(UserError, match=r"its part '../../x.safetensors' is not beside it"):
        hub.fetch("hf://org/large")


@pytest.mark.parametrize("name", [WEIGHTS, "model-1-of-1.safetensors"])
def test_a_file_that_the_cache_has_in_part_is_said_to_be(server, name):
    commit = server.commit("org/vit", {
        name: model()[WEIGHTS],
        f"{WEIGHTS}.index.json": json.dumps({"weight_map": {"x": name}}).encode(),
    })  # fmt: skip
    path = hub.fetch("hf://org/vit").path.with_name(name)
    path.resolve().write_bytes(path.read_bytes()[:-1])
    again = f"hf download org/vit {name} --revision {commit} --force-download"
    with pytest.raises(UserError, match=f"{name}: not a whole safetensors file: .*{again}$"):
        load_encoder("hf://org/vit")


def test_of_those_that_share_a_cache_one_downloads(server):
    """As the processes of a machine do, and machines whose HF_HOME is on shared storage."""
    server.commit("org/vit", model())
    server.pause = 0.3
    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(hub.fetch, ["hf://org/vit"] * 3))
    assert len(found) == 1
    assert sorted(server.sent) == [CONFIG, WEIGHTS, PROCESSOR]


def test_hosts_download_before_they_join(server, monkeypatch, tmp_path):
    """Once they have joined, JAX ends those that wait for another for a minute."""
    server.commit("org/vit", model())
    config = configs.load(str(CONFIGS / "eval.py:test"), ["init_from=hf://org/vit,hf://org/absent"])
    seen = []

    def join(_):
        seen.extend(server.sent)
        raise UserError("joined")

    monkeypatch.setattr(configs, "from_command_line", lambda _: (config, arguments))
    monkeypatch.setattr(main, "_keep_programs", lambda: None)
    monkeypatch.setattr(main, "_join_hosts", join)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    for dry_run, want in ((True, []), (False, [CONFIG, WEIGHTS, PROCESSOR])):
        arguments = SimpleNamespace(workdir=tmp_path, host_timeout=1, dry_run=dry_run)
        with pytest.raises(UserError, match="joined"):
            main._run()
        assert sorted(seen) == want


def test_each_failure_is_a_line_that_names_what_to_do(server, monkeypatch):
    monkeypatch.setattr(tensors, "import_torch", lambda _: None)
    files = {"a.pth": b"a", "b.pth": b"b", CONFIG: b"{}"}
    for name in ("vit", "gated", "private"):
        server.commit(f"org/{name}", files)
    server.commit("org/empty", {CONFIG: b"{}"})
    server.gated.add("org/gated")
    server.private.add("org/private")
    commit = "0" * 40
    for named, message in (
        ("hf://org", r"must be hf://ORG/NAME\[@REVISION\]\[/FILE\]"),
        ("hf:/org/vit", "must be hf://ORG/NAME"),  # of a Path
        ("hf://o..rg/vit", "is not an id of the hub"),
        ("hf://org/absent", "no such repository at http.* or it is private; .*HF_TOKEN"),
        ("hf://org/private", "no such repository"),
        ("hf://org/gated/a.pth", "is gated; ask for access at http.*/org/gated, .*HF_TOKEN"),
        ("hf://org/vit@v2", "has no revision 'v2'; name a branch, a tag or a commit"),
        (f"hf://org/vit@{commit}", f"has no revision '{commit}'"),
        ("hf://org/vit", "name one of its files .*: a.pth, b.pth"),
        ("hf://org/vit/c.pth", "has no such file"),
        ("hf://org/empty", f"holds no weights; it has {CONFIG}"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            hub.fetch(named)
        assert str(caught.value).startswith(named)
        assert len(str(caught.value).splitlines()) == 1
    assert server.sent == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub.fetch("hf://org/gated/a.pth").path.read_bytes() == b"a"
    assert hub.fetch("hf://org/private/a.pth").path.read_bytes() == b"a"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"the extra \[hub\]: pip install huggingface_hub"):
        hub.fetch("hf://org/vit/a.pth")


def test_without_a_network_the_cache_is_taken_and_said_to_be(server, offline, caplog, monkeypatch):
    commit = server.commit("org/vit", model() | JUNK)
    server.commit("org/other", {"a.pth": b"a", CONFIG: b"{}"})
    client.snapshot_download("org/vit", allow_patterns=["*.json", WEIGHTS])
    client.hf_hub_download("org/other", CONFIG)  # and not its weights
    server.commit("org/ours", {"a.pth": b"a", WEIGHTS: b"w", CONFIG: b"{}"})
    ours = hub.fetch("hf://org/ours")
    offline()
    assert hub.fetch("hf://org/ours") == ours
    assert "is not in" not in caplog.text  # it has no config but that, as the cache knows
    with caplog.at_level(logging.WARNING, "maect_jax"):
        assert hub.fetch("hf://org/vit").id == f"hf://org/vit@{commit}/{WEIGHTS}"
        assert f"takes {WEIGHTS} of commit {commit} from its cache" in caplog.text
        caplog.clear()
        assert hub.fetch(f"hf://org/vit@{commit}/{WEIGHTS}").path.is_file()
        assert caplog.text == ""  # nothing else can be meant
        for named in (
            "hf://org/other",
            "hf://org/other/a.pth",
            "hf://org/absent",
            "hf://org/vit@v2",
        ):
            with pytest.raises(UserError, match=r"not in the hub's cache .* HF_HUB_OFFLINE is set"):
                hub.fetch(named)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:9")
    with pytest.raises(UserError, match="http://localhost:9 cannot be reached"):
        hub.fetch("hf://org/other")
    with socket.create_server(("localhost", 0)) as silent:  # takes what it is sent, as firewalls do
        address = f"http://localhost:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
        with pytest.raises(UserError, match=rf"{address} cannot be reached \(timed out"):
            hub.fetch("hf://org/other")
    # What the config says is not known, and that is said.
    server.commit("org/bare", {WEIGHTS: b"x", CONFIG: b"{}"})
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    client.hf_hub_download("org/bare", WEIGHTS)
    offline()
    with caplog.at_level(logging.WARNING, "maect_jax"):
        hub.fetch("hf://org/bare")
    assert f"{CONFIG} is not in the hub's cache" in caplog.text


def test_a_dry_run_downloads_nothing(server, capsys):
    commit = server.commit("org/vit", model())
    name, absent = (
        str(CONFIGS / "tune_my_images.py:test"),
        "hf://org/vit: is not in the hub's cache",
    )
    settings = ("init_from=hf://org/vit", "data.mean=(0.25,)", "data.std=(0.5,)")
    pipeline.dry_run(configs.load(name, settings))
    assert f"its model is not known: {absent}" in (printed := capsys.readouterr().out)
    assert "a dry run downloads nothing" in printed
    assert server.sent == []
    hub.fetch("hf://org/vit")
    pipeline.dry_run(configs.load(name, settings))
    assert f"from hf://org/vit@{commit}/{WEIGHTS}\n" in capsys.readouterr().out
    # What is in the cache is not what a run would take.
    server.commit("org/vit", model(seed=1))
    pipeline.dry_run(configs.load(name, settings))
    assert absent in capsys.readouterr().out
