"""Model folders and files fetched from a hub."""

import base64
import hashlib
import http.server
import json
import sys
import threading

import pytest
import torch
from tiny_teachers import checkpoint, python, teacher_of, velocity

import flowdistill
from flowdistill import CheckpointError, ConfigError, load_teacher
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.networks import MLP
from flowdistill.runs.exporting import export
from flowdistill.runs.pretrained import locate, save_model


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the HuggingFace hub does to a request for a file, and hangs up on one repository."""

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, with_body):
        self.server.requests.append((self.command, self.path))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and "tree" in parts:  # the files of a repository
            files = self.server.repositories["/".join(parts[2:4])]
            return self._say(200, [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()])
        repository, file = "/".join(parts[:2]), "/".join(parts[4:])
        if repository == "someone/torn":
            return self.connection.close()
        files = self.server.repositories.get(repository) if parts[2:4] == ["resolve", "main"] or with_body else None
        content = None if files is None else files.get(file)
        self.send_response(200 if content is not None else 404)
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        if content is None:
            content = b""
            self.send_header("X-Error-Code", "RepoNotFound" if files is None else "EntryNotFound")
        else:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return self.wfile.write(content) if with_body else None

    def do_POST(self):
        """Make a repository, say how its files are to come, or take a commit of them."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.command, self.path))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if self.headers.get("Authorization") != "Bearer hf_secret":
            return self._say(401, {"error": "who are you?"})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            private = asked.get("private") or asked.get("visibility") == "private"  # old and new clients
            self.server.visibilities.append("private" if private else "public")
            self.server.repositories.setdefault(name, {})
            return self._say(200, {"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name})
        if parts == ["api", "validate-yaml"]:  # of the model card
            return self._say(200, {"errors": [], "warnings": []})
        name = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self._say(200, {"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        self.server.repositories[name] |= {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        for line in lines:
            if line["key"] == "deletedFile":
                self.server.repositories[name].pop(line["value"]["path"], None)
        commit = "0123456789abcdef0123456789abcdef01234567"
        return self._say(
            200,
            {
                "commitUrl": f"http://{self.headers['Host']}/{name}/commit/{commit}",
                "commitOid": commit,
                "success": True,
            },
        )

    def _say(self, code, answer):
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_args):
        pass


@pytest.fixture
def hub(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.repositories, server.visibilities = [], {}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


FETCH = """
import json, sys, time, torch, flowdistill
results = {}
def attempt(name, *args, **kwargs):
    start = time.monotonic()
    try:
        teacher = flowdistill.load_teacher(*args, **kwargs)
        x = torch.randn(4, *teacher.sample_shape, generator=torch.Generator().manual_seed(0))
        t, labels = torch.tensor([0.1, 0.5, 0.9, 1.0]), torch.tensor([0, 1, 2, -1])
        torch.save(teacher.velocity(x, t, flowdistill.Condition(labels)), name + ".velocity")
        results[name] = ["loaded", type(teacher).__name__]
    except flowdistill.FlowDistillError as error:
        results[name] = [type(error).__name__, str(error)]
    results[name].append(time.monotonic() - start)
attempt("model", "hf://someone/tiny")
attempt("file", "sit_teacher", checkpoint="hf://someone/tiny/deep/tiny.pt", num_heads=2)
attempt("by_suffix", "hf://someone/tiny/deep/tiny.pt", num_heads=2)
attempt("no_repository", "hf://someone/nothing")
attempt("no_file", "sit_teacher", checkpoint="hf://someone/tiny/huge.pt")
attempt("no_model", "hf://someone/empty")
attempt("torn", "hf://someone/torn")
attempt("name", "hf://not a name")
json.dump(results, open("results.json", "w"))
"""


def test_a_hub_gives_model_folders_and_files(tmp_path, hub):
    teacher, other = teacher_of(seed=1), checkpoint(tmp_path / "tiny.pt")
    save_model(teacher, tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    hub.repositories["someone/tiny"] = files | {"deep/tiny.pt": (tmp_path / "tiny.pt").read_bytes()}
    hub.repositories["someone/empty"] = {"config.json": b"{}"}
    cache = tmp_path / "cache"
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    done = python(FETCH, tmp_path, HF_ENDPOINT=endpoint, HF_HOME=cache, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["model"][:2] == ["loaded", "NetworkTeacher"]
    assert torch.equal(torch.load(tmp_path / "model.velocity"), velocity(teacher))
    for name in ("file", "by_suffix"):
        assert results[name][:2] == ["loaded", "SiTTeacher"]
        assert torch.equal(torch.load(tmp_path / f"{name}.velocity"), velocity(other))
    gets = [path for method, path in hub.requests if method == "GET" and path.startswith("/someone/tiny")]
    assert len(gets) == 3  # the file was fetched once
    for name, place in (
        ("no_repository", "hf://someone/nothing"),
        ("no_file", "hf://someone/tiny/huge.pt"),
        ("no_model", "hf://someone/empty"),
        ("torn", "hf://someone/torn"),
    ):
        kind, message, seconds = results[name]
        assert kind == "CheckpointError", message
        assert message.startswith(f"there is no file {place}, and the hub does not give it: ")
        assert len(message.splitlines()) == 1
        assert seconds < 20
    assert "Repository Not Found" in results["no_repository"][1]
    assert "Entry Not Found" in results["no_file"][1]
    assert results["name"][:2] == ["CheckpointError", "there is no file hf://not a name"]


def test_a_hub_gives_students(tmp_path, hub):
    torch.manual_seed(0)
    student = NetworkFlowMap(MLP(dim=2, hidden_size=8))
    folder = export(student, tmp_path / "student")
    hub.repositories["someone/student"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = "import flowdistill, torch; student = flowdistill.load_flow_map('hf://someone/student'); "
    code += "torch.save(flowdistill.sample(student, 3, device='cpu'), 'samples.pt')"
    endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": tmp_path / "cache"}
    done = python(code, tmp_path, **endpoint, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "samples.pt"), flowdistill.sample(student.eval(), 3, device="cpu"))


def test_without_huggingface_hub_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # what an import of it sees where it is missing
    for place in ("hf://someone/tiny", "hf://someone/tiny/tiny.pt"):
        with pytest.raises(ConfigError, match=r"needs huggingface_hub: pip install 'flowdistill\[hub\]'"):
            locate(place)
    with pytest.raises(ConfigError, match="huggingface_hub"):
        load_teacher("hf://someone/tiny")


def test_a_path_is_taken_before_a_repository_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    save_model(teacher_of(), tmp_path / "owner" / "model")
    assert locate("owner/model").resolve() == tmp_path / "owner" / "model"
    assert load_teacher("owner/model").num_classes == 3
    for missing in ("nothing.pt", "owner/nothing.pt", "owner/model/more.pt", "/nothing"):
        with pytest.raises(CheckpointError, match=f"^there is no file {missing}$"):
            locate(missing)


PUSH = """
import json, flowdistill
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.networks import MLP
student = NetworkFlowMap(MLP(dim=2, hidden_size=8), "anchored")
def attempt(*args, **kwargs):
    try:
        return str(flowdistill.export(student, *args, **kwargs))
    except flowdistill.FlowDistillError as error:
        return f"{type(error).__name__}: {error}"
said = [attempt("hf://someone/mine", private=True), attempt("hf://mine"), attempt("hf://someone/again")]
x = flowdistill.sample(student, 3).tolist()
y = flowdistill.sample(flowdistill.load_flow_map("hf://someone/mine"), 3).tolist()
json.dump({"said": said, "same": x == y}, open("results.json", "w"))
"""


def test_a_student_is_written_to_the_hub_and_read_from_there(tmp_path, hub):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    hub.repositories["someone/mine"] = {"student.onnx": b"of another student", "LICENSE": b"mine"}
    place = {"HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    done = python(PUSH, tmp_path, **place, HF_HOME=tmp_path / "home", HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["said"][0] == "hf://someone/mine"
    assert "a repository is hf://OWNER/NAME" in results["said"][1]
    assert results["same"]
    written = {"README.md", "config.json", "model.safetensors", "samples.png"}
    assert hub.repositories["someone/mine"].keys() == {*written, "LICENSE"}
    assert b"load_flow_map('hf://someone/mine')" in hub.repositories["someone/mine"]["README.md"]
    assert hub.visibilities == ["private", "public"]
    assert b"# mine\n" in hub.repositories["someone/mine"]["README.md"]


@pytest.mark.slow
def test_a_hub_that_refuses_a_student_is_told(tmp_path, hub):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    place = {"HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = python(PUSH, tmp_path, **place, HF_HOME=tmp_path / "home", HF_TOKEN="hf_other")
    assert "CheckpointError" in done.stderr  # there is nothing to read back
    (tmp_path / "again.py").write_text(PUSH.partition("y = ")[0] + "print(said)")
    done = python((tmp_path / "again.py").read_text(), tmp_path, **place, HF_HOME=tmp_path / "home", HF_TOKEN="hf_x")
    assert done.returncode == 0, done.stderr
    assert "CheckpointWriteError: the hub does not take hf://someone/mine: " in done.stdout
    assert hub.repositories == {}
