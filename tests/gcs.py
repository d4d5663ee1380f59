"""A Google Cloud Storage on this machine: the part of its JSON API that gcsfs and TensorStore use, kept in memory.

https://cloud.google.com/storage/docs/json_api/v1
"""

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse


class Answers(http.server.BaseHTTPRequestHandler):
    """What the servers of the tests share."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, code, body=b"", **headers):
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), headers | {"Content-Type": "application/json"}
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Server(http.server.ThreadingHTTPServer):
    """Attributes: objects, {(bucket, name): (generation, bytes)}; url."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("localhost", 0), Handler)
        self.objects, self.uploads, self.generation, self.lock = {}, {}, 0, threading.Lock()
        self.url = f"http://localhost:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(Answers):
    def meta(self, key):
        generation, data = self.server.objects[key]
        return {
            "kind": "storage#object", "bucket": key[0], "name": key[1], "size": str(len(data)),
            "generation": str(generation), "metageneration": "1", "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z", "contentType": "application/octet-stream",
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
        }  # fmt: skip

    def handle_any(self):
        url = urllib.parse.urlsplit(self.path)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        with self.server.lock:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.route(url.path, query, body)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = handle_any

    def route(self, path, query, body):
        objects = self.server.objects
        path = re.sub(r"^/download", "", path)
        if path.startswith("/batch"):
            return self.batch(body)
        if match := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", path):
            return self.upload(match[1], query, body)
        copying = r"/storage/v1/b/([^/]+)/o/([^/]+)/(rewriteTo|copyTo|moveTo)(?:/b/([^/]+))?/o/([^/]+)"
        if match := re.fullmatch(copying, path):
            source = match[1], urllib.parse.unquote(match[2])
            if source not in objects:
                return self.answer(404, {"error": {"code": 404, "message": "Not Found"}})
            key = match[4] or match[1], urllib.parse.unquote(match[5])
            self.put(key, objects[source][1])
            if match[3] == "moveTo":
                del objects[source]
            resource = self.meta(key)
            return self.answer(200, {"done": True, "resource": resource} if match[3] == "rewriteTo" else resource)
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/(.+)", path):
            return self.one((match[1], urllib.parse.unquote(match[2])), query)
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/?", path):
            return self.list(match[1], query)
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
            return self.answer(200, {"kind": "storage#bucket", "name": match[1], "location": "EU"})
        return self.answer(404, {"error": {"code": 404, "message": f"Not Found {path}"}})

    def put(self, key, data):
        self.server.generation += 1
        self.server.objects[key] = (self.server.generation, data)

    def changed(self, key, query):
        """Whether a precondition on the object's generation fails."""
        now = str(self.server.objects[key][0]) if key in self.server.objects else "0"
        return query.get("ifGenerationMatch", now) != now or (query.get("ifGenerationNotMatch") == now)

    def one(self, key, query):
        objects = self.server.objects
        if key not in objects and "ifGenerationMatch" not in query:
            return self.answer(404, {"error": {"code": 404, "message": "Not Found"}})
        if self.changed(key, query):
            return self.answer(304 if "ifGenerationNotMatch" in query else 412)
        if self.command == "DELETE":
            del objects[key]
            return self.answer(204)
        if query.get("alt") != "media":
            return self.answer(200, self.meta(key))
        generation, data = objects[key]
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(match[1]) if match[1] else max(0, len(data) - int(match[2]))
            last = min(int(match[2]), len(data) - 1) if match[1] and match[2] else len(data) - 1
            if first >= len(data):
                return self.answer(416, Content_Range=f"bytes */{len(data)}")
            headers = {"X_Goog_Generation": generation, "Content_Range": f"bytes {first}-{last}/{len(data)}"}
            return self.answer(206, data[first : last + 1], **headers)
        return self.answer(200, data, X_Goog_Generation=generation)

    def list(self, bucket, query):
        prefix, delimiter, items, folders = query.get("prefix", ""), query.get("delimiter"), [], set()
        for key in sorted(self.server.objects):
            name = key[1]
            if key[0] != bucket or not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if query.get("endOffset") and name >= query["endOffset"]:
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(self.meta(key))
        self.answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})

    def upload(self, bucket, query, body):
        kind, name = query["uploadType"], query.get("name")
        if kind == "resumable":
            if "upload_id" not in query:
                name = name or json.loads(body)["name"]
                identity = str(len(self.server.uploads))
                self.server.uploads[identity] = [(bucket, name), b""]
                query = f"uploadType=resumable&upload_id={identity}"
                return self.answer(200, Location=f"{self.server.url}/upload/storage/v1/b/{bucket}/o?{query}")
            upload = self.server.uploads[query["upload_id"]]
            upload[1] += body
            if self.headers["Content-Range"].endswith("/*"):
                return self.answer(308, Range=f"bytes=0-{len(upload[1]) - 1}")
            self.put(*upload)
            return self.answer(200, self.meta(upload[0]))
        if kind == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1].encode()
            _, head, content, _ = body.split(b"--" + boundary, 3)
            name = name or json.loads(re.split(b"\r?\n\r?\n", head, maxsplit=1)[1])["name"]
            body = re.sub(rb"\r?\n$", b"", re.split(b"\r?\n\r?\n", content, maxsplit=1)[1])
        if self.changed((bucket, name), query):
            return self.answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        self.put((bucket, name), body)
        return self.answer(200, self.meta((bucket, name)))

    def batch(self, body):
        out = b""
        for identity, path in re.findall(rb"Content-ID: <?([^>\r\n]+)>?.*?DELETE ([^ ]+)", body, re.DOTALL):
            bucket, name = re.search(r"/b/([^/]+)/o/([^/?]+)", path.decode()).groups()
            found = self.server.objects.pop((bucket, urllib.parse.unquote(name)), None)
            status = b"204 No Content" if found else b"404 Not Found"
            out += b"--x\r\nContent-Type: application/http\r\nContent-ID: <response-" + identity
            out += b">\r\n\r\nHTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n\r\n"
        self.answer(200, out + b"--x--\r\n", Content_Type="multipart/mixed; boundary=x")
