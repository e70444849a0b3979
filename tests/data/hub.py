"""The part of the Hugging Face hub's API that `hf://` uses, serving a local folder."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest
from huggingface_hub import HfFileSystem

NAME = "someone/images"


def _entry(root: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest()}
    data = path.read_bytes()
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@contextmanager
def hub(root: Path) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Serve a folder as a dataset's repository.

    Yields:
        The repository's URI, and a growing list of (path, number of bytes) of each file that was sent.
    """
    sent = list[tuple[str, int]]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, content: bytes, status: int = 200, **headers: str) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _json(self, value: Any) -> None:
            self._answer(json.dumps(value).encode(), Content_Type="application/json")

        def _missing(self, code: str) -> None:
            self._answer(b"{}", 404, X_Error_Code=code, X_Error_Message="not there")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            paths = [root / name for name in asked]
            self._json([_entry(root, path) for path in paths if path.exists()])

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path, query = unquote(url.path), parse_qs(url.query)
            api, files = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/main/"
            if path.startswith(f"{api}/tree/main"):
                folder = root / path.removeprefix(f"{api}/tree/main").strip("/")
                if not folder.is_dir():
                    return self._missing("EntryNotFound")
                whole = query.get("recursive", ["False"])[0].lower() in ("true", "1")
                found = folder.rglob("*") if whole else folder.iterdir()
                return self._json([_entry(root, one) for one in sorted(found)])
            if path.startswith(files):
                return self._file(root / path.removeprefix(files))
            if path in (api, f"{api}/revision/main"):
                return self._json({"id": NAME, "sha": "0" * 40, "siblings": [], "private": False, "tags": []})
            return self._missing("RepoNotFound")

        do_HEAD = do_GET

        def _file(self, path: Path) -> None:
            if not path.is_file():
                return self._missing("EntryNotFound")
            data = path.read_bytes()
            asked = self.headers.get("Range", "").removeprefix("bytes=").split("-")
            first, last = (int(asked[0]), int(asked[1])) if len(asked) == 2 else (0, len(data) - 1)
            content = data[first : last + 1]
            if self.command == "GET":
                sent.append((path.name, len(content)))
            span = f"bytes {first}-{first + len(content) - 1}/{len(data)}"
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            status = 206 if len(asked) == 2 else 200
            return self._answer(content, status, Content_Range=span, ETag=etag, X_Repo_Commit="0" * 40)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, "hf", {"endpoint": f"http://127.0.0.1:{server.server_port}"})
        patch.setenv("NO_PROXY", "127.0.0.1")
        HfFileSystem.clear_instance_cache()
        try:
            yield f"hf://datasets/{NAME}", sent
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
            HfFileSystem.clear_instance_cache()
