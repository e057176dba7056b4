"""The Hugging Face hub: pushed to and loaded from a server on this machine that speaks the hub's HTTP, by its real
client."""

import base64
import copy
import hashlib
import http.server
import json
import pickle
import subprocess
import sys
import threading
from dataclasses import dataclass, field

import pytest
import torch
from huggingface_hub import ModelHubMixin, constants

import visionmoe as vm
from visionmoe.cli import main
from visionmoe.model.hub import fetch, split_name

SMALL = vm.ModelConfig(
    image_size=16, patch_size=8, num_classes=5, hidden_size=16, num_layers=2, mlp_dim=24, num_heads=2
).replace(num_experts=4, layers=(1,), capacity_factor=1.5)


@dataclass
class Hub:
    """Repositories: name -> revision (a commit's number as text) -> files; "main" is the newest."""

    url: str = ""
    repos: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    forbidden: bool = False

    def commit(self, repo, files):
        self.repos.setdefault(repo, []).append({**(self.repos.get(repo) or [{}])[-1], **files})
        return commit_name(len(self.repos[repo]) - 1)

    def files(self, repo, revision):
        """(commit, its files) or None."""
        commits = self.repos[repo]
        names = {commit_name(i): files for i, files in enumerate(commits)}
        if revision == "main":
            revision = commit_name(len(commits) - 1)
        return (revision, names[revision]) if revision in names else None


def commit_name(number):
    return hashlib.sha1(str(number).encode()).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        if len(parts) < 5 or parts[2] != "resolve":
            self.answer(404)
            return
        repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if repo in self.hub.gated:
            self.answer(403, X_Error_Code="GatedRepo")
        elif repo in self.hub.hidden or repo not in self.hub.repos:
            self.answer(401, X_Error_Code="RepoNotFound")
        elif self.hub.files(repo, revision) is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif name not in self.hub.files(repo, revision)[1]:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.hub.files(repo, revision)[0])
        else:
            commit, files = self.hub.files(repo, revision)
            etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
            self.answer(200, files[name], ETag=etag, X_Repo_Commit=commit)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if self.hub.forbidden:
            self.answer(403, b'{"error": "no rights"}')
        elif parts == ["api", "repos", "create"]:
            data = json.loads(body)
            repo = f"{data['organization']}/{data['name']}"
            if repo in self.hub.repos:
                self.answer(409, json.dumps({"url": f"{self.hub.url}/{repo}"}).encode())
            else:
                self.hub.repos[repo] = [{}]
                self.json({"url": f"{self.hub.url}/{repo}"})
        elif parts == ["api", "validate-yaml"]:  # the card's metadata
            self.json({"errors": [], "warnings": []})
        elif self.hub.files("/".join(parts[2:4]), parts[5]) is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif parts[4] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.json({"files": files})
        elif parts[4] == "commit":
            lines = [json.loads(line) for line in body.decode().splitlines()]
            files = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                     for line in lines if line["key"] == "file"}  # fmt: skip
            repo = "/".join(parts[2:4])
            oid = self.hub.commit(repo, files)
            self.json({"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})
        else:
            self.answer(404)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub; huggingface_hub talks to it and keeps its cache in tmp_path."""
    state = Hub()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state}))
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", state.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", state.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = vm.create_model(SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def assert_same(loaded, model):
    assert loaded.config == model.config and not loaded.training
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_pushed_and_loaded(hub, model, tmp_path):
    model.set_routing(capacity_factor=0.75)
    url = model.push_to_hub("user/name")
    assert url.startswith(f"{hub.url}/user/name/commit/")
    assert set(hub.repos["user/name"][-1]) == {"config.json", "model.safetensors", "README.md"}
    assert_same(vm.load("hf-hub:user/name"), model)
    assert_same(vm.VisionTransformer.from_pretrained("user/name"), model)
    changed = vm.load("hf-hub:user/name", num_classes=7, image_size=32, cache_dir=tmp_path / "other")
    assert changed.head.weight.shape == (7, 16) and changed.config.image_size == 32
    assert (tmp_path / "other" / "models--user--name").is_dir()


def test_a_revision(hub, model):
    model.push_to_hub("user/name")
    first = commit_name(len(hub.repos["user/name"]) - 1)
    newer = copy.deepcopy(model)
    with torch.no_grad():
        newer.head.bias.add_(1)
    newer.push_to_hub("user/name")
    assert_same(vm.load(f"hf-hub:user/name@{first}"), model)
    assert_same(vm.load("hf-hub:user/name"), newer)
    assert_same(vm.VisionTransformer.from_pretrained("user/name", revision=first), model)


def test_card_states_the_facts_and_is_kept_once_it_is_there(hub, model):
    model.push_to_hub("user/name")
    card = hub.repos["user/name"][-1]["README.md"].decode()
    parameters = sum(p.numel() for p in model.parameters())
    for words in (f"| parameters | {parameters:,} |", "license: apache-2.0", "library_name: visionmoe", "# user/name",
                  'vm.load("hf-hub:user/name")', "4 in blocks 1", "2 experts per token, capacity factor 1.5, vanilla",
                  "arxiv.org/abs/2106.05974", "| images | 16 x 16 x 3,",
                  "pipeline_tag: image-classification"):  # fmt: skip
        assert words in card, words
    hub.commit("user/name", {"README.md": b"written by hand"})
    for branch in (None, "main"):
        model.push_to_hub("user/name", branch=branch)
        assert hub.repos["user/name"][-1]["README.md"] == b"written by hand"
    with pytest.raises(FileNotFoundError, match=r"user/name on .* has no such revision"):
        model.push_to_hub("user/name", branch="nowhere")


def test_class_names_are_pushed_and_loaded(hub, model):
    model.class_names = tuple("abcde")
    model.push_to_hub("user/name")
    for loaded in (vm.load("hf-hub:user/name"), vm.VisionTransformer.from_pretrained("user/name")):
        assert loaded.class_names == ("a", "b", "c", "d", "e")
    assert vm.load("hf-hub:user/name", num_classes=7).class_names is None


def test_without_the_hub_a_file_that_was_never_asked_for_is_an_error(hub, model, monkeypatch):
    model.push_to_hub("user/name")
    hub.commit("user/name", {"there.json": b"{}"})
    folder = fetch("user/name", optional=("there.json", "absent.json"))
    assert (folder / "there.json").is_file() and not (folder / "absent.json").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("user/name", optional=("there.json", "absent.json")) == folder  # that it has no such file is known
    with pytest.raises(ConnectionError, match="user/name is not in the cache") as caught:
        fetch("user/name", optional=("unknown.json",))
    assert "\n" not in str(caught.value)


def test_card_of_a_dense_model():
    card = str(vm.create_model(SMALL.replace(layers=())).generate_model_card())
    assert "A Vision Transformer, made with" in card and "experts" not in card.partition("## Licence")[
        0
    ].lower().replace("mixture-of-experts", "")


@pytest.mark.parametrize("name, error, words", [
    ("user/none", FileNotFoundError, "has no user/none, or it is private and you are not logged in"),
    ("user/hidden", FileNotFoundError, "has no user/hidden, or it is private and you are not logged in"),
    ("user/gated", PermissionError, "user/gated is gated: ask for access on its page"),
    ("user/empty", FileNotFoundError, "is no model of this format"),
    ("user/half", FileNotFoundError, r"is no model of this format.*model\.safetensors"),
    ("user/foreign", ValueError, "config.json is not a model's config: its format must be 'visionmoe-1'"),
    ("user/good@nowhere", FileNotFoundError, "user/good on .* has no such revision"),
    ("user/na me", ValueError, "'user/na me' is no name of a model on the hub"),
    ("a/b/c", ValueError, "a model on the hub is hf-hub:USER/NAME"),
])  # fmt: skip
def test_what_cannot_be_loaded_is_one_line(hub, model, name, error, words, tmp_path, capsys):
    model.save_pretrained(tmp_path / "good")
    good = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
    for repo, files in {
        "good": good, "hidden": good, "gated": good, "empty": {"x": b""}, "half": {"config.json": good["config.json"]},
        "foreign": {**good, "config.json": b'{"model_type": "vit"}'},
    }.items():  # fmt: skip
        hub.commit(f"user/{repo}", files)
    hub.hidden, hub.gated = {"user/hidden"}, {"user/gated"}
    with pytest.raises(error, match=words) as caught:
        vm.load(f"hf-hub:{name}")
    assert "\n" not in str(caught.value)
    assert main(["evaluate", f"hf-hub:{name}", "--data", "fashion-mnist", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_hub_at_all_is_one_line(hub, model, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9\) cannot be reached for user/name") as caught:
        model.push_to_hub("user/name")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="user/name is not in the cache") as caught:
        vm.load("hf-hub:user/name")
    assert "\n" not in str(caught.value)


def test_a_push_without_rights_is_one_line(hub, model):
    hub.forbidden = True
    with pytest.raises(PermissionError, match="refused user/name") as caught:
        model.push_to_hub("user/name")
    assert "\n" not in str(caught.value)


def test_options_of_the_model_belong_to_load(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"takes no options of the model, got num_classes: use visionmoe\.load"):
        vm.VisionTransformer.from_pretrained(str(tmp_path / "saved"), num_classes=3)
    assert_same(vm.VisionTransformer.from_pretrained(tmp_path / "saved"), model)


def test_split_name():
    assert split_name("user/name") == ("user/name", None)
    assert split_name("user/name@v1.0") == ("user/name", "v1.0")
    assert split_name("gpt2") == ("gpt2", None)


def test_the_mixin_changes_nothing_else(model):
    assert isinstance(model, ModelHubMixin) and isinstance(model, torch.nn.Module)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(twin, model)
        assert twin.state_dict().keys() == model.state_dict().keys()
    images = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).logits, model(images).logits)


def test_the_package_starts_without_the_hub():
    program = "import sys, visionmoe, visionmoe.cli; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
