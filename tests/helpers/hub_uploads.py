"""What the loopback Hub answers to uploads: repositories created, large files stored on their own, commits."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Set
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from helpers.hub_server import File, HubServer, Request

LICENSES = ("apache-2.0", "mit", "cc-by-nc-sa-4.0", "cc-by-nc-4.0", "cc-by-4.0", "other")
_LFS = "application/vnd.git-lfs+json"
_LARGE = 10_000_000


class Uploads(BaseHTTPRequestHandler):
    """The part of the handler of ``hub_server`` that takes uploads; the rest sends the answers.

    Tokens are given by ``HubServer.allow``. Every other one, or none, is refused, as is a request that says more or
    less than huggingface_hub says.
    """

    hub: HubServer
    body: bytes
    request_seen: Request

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        raise NotImplementedError

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        raise NotImplementedError

    def _writer(self, owner: str) -> bool:
        """Whether the token may write to the owner's repositories; the refusal is sent if not."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.writers:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif self.hub.writers[token] != owner:
            self._refuse(403, "", f"You don't have the rights to write to {owner}")
        else:
            return True
        return False

    def _create_repo(self) -> None:
        wanted = self._json({"name", "organization"}, {"type", "visibility", "private"})
        if wanted is None or not self._writer(wanted["organization"]):
            return
        repo = f"{wanted['organization']}/{wanted['name']}"
        facts = {"url": f"{self.hub.url}/{repo}", "name": repo}
        if repo in self.hub.branches:
            return self._answer_json(409, {"error": "You already created this model repo", **facts})
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.add(repo, ".gitattributes", b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", lfs=False)
        if private:
            self.hub.require_token(repo, self.headers["Authorization"].removeprefix("Bearer "))
        return self._answer_json(200, facts)

    def _validate_yaml(self) -> None:
        """Front matter is checked as far as this project writes it."""
        wanted = self._json({"content", "repoType"})
        if wanted is None:
            return None
        try:
            facts = yaml.safe_load(wanted["content"].split("---\n")[1])
            errors = [] if facts["license"] in LICENSES else [f"license must be one of {LICENSES}"]
            errors += (
                ["license_name is missing"] if facts["license"] == "other" and not facts.get("license_name") else []
            )
            errors += [
                f"{key} must be text"
                for key in ("license", "library_name", "pipeline_tag")
                if not isinstance(facts.get(key), str)
            ]
        except (IndexError, KeyError, TypeError, yaml.YAMLError) as error:
            errors = [f"no front matter: {error!r}"]
        return self._answer_json(
            400 if errors else 200, {"errors": [{"message": text} for text in errors], "warnings": []}
        )

    def _preupload(self, repo: str, tree: Mapping[str, File]) -> None:
        wanted = self._json({"files"})
        if wanted is None or not self._writer(repo.split("/")[0]):
            return
        modes = []
        for file in wanted["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] > _LARGE
            known = tree.get(file["path"])
            oid = {"oid": known.etag if known.lfs else known.blob_id} if known else {}
            modes.append(
                {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **oid}
            )
        self._answer_json(200, {"files": modes})

    def _lfs(self, repo: str, action: str) -> None:
        if repo not in self.hub.branches:
            return self._bad_request()
        if not self._writer(repo.split("/")[0]):
            return
        if action == "verify":
            wanted = self._json({"oid", "size"})
            if wanted is not None:
                stored = self.hub.objects.get(wanted["oid"])
                self._answer_json(200 if stored is not None and len(stored) == wanted["size"] else 422, {})
            return
        wanted = self._json({"operation", "transfers", "objects", "hash_algo"}, {"ref"})
        if wanted is None:
            return
        if (
            self.headers.get("Content-Type") != _LFS
            or wanted["operation"] != "upload"
            or "basic" not in wanted["transfers"]
        ):
            return self._bad_request()
        objects = []
        for item in wanted["objects"]:
            links = {
                "upload": {"href": f"{self.hub.storage_url}/uploads/{item['oid']}"},
                "verify": {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify"},
            }
            objects.append({**item, **({} if item["oid"] in self.hub.objects else {"actions": links})})
        self._answer_json(200, {"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        """Keep an object under its hash, the only name that the storage knows."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._send(400, b"the checksum differs")
        self.hub.objects[oid] = self.body
        return self._send(200, b"", {"ETag": f'"{oid}"'})

    def _commit_files(self, repo: str, revision: str, parent: str) -> None:
        if not self._writer(repo.split("/")[0]):
            return None
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["key"] != "header" or not header["value"]["summary"] or not operations:
            return self._bad_request()
        if header["value"].get("parentCommit", parent) != parent:
            return self._refuse(412, "", "The branch has moved on")
        for operation in operations:
            facts = operation["value"]
            if operation["key"] == "file" and facts["encoding"] == "base64":
                parent = self.hub.add(
                    repo, facts["path"], base64.b64decode(facts["content"]), lfs=False, revision=revision
                )
            elif operation["key"] == "lfsFile" and facts["algo"] == "sha256" and facts["oid"] in self.hub.objects:
                parent = self.hub.add(repo, facts["path"], self.hub.objects[facts["oid"]], revision=revision)
            else:
                return self._bad_request()
        self.hub.pushed.append(
            (repo, header["value"]["summary"], [operation["value"]["path"] for operation in operations])
        )
        return self._answer_json(
            200, {"success": True, "commitOid": parent, "commitUrl": f"{self.hub.url}/{repo}/commit/{parent}"}
        )

    def _json(self, required: set[str], optional: Set[str] = frozenset()) -> dict[str, Any] | None:
        """The body, None after a refusal because it does not say exactly what is expected."""
        content = json.loads(self.body)
        if required <= content.keys() <= required | optional:
            return content
        self._bad_request()
        return None

    def _bad_request(self) -> None:
        self.hub.unexpected.append(self.request_seen)
        self._refuse(400, "", "not what huggingface_hub sends")

    def _answer_json(self, status: int, value: object) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})
