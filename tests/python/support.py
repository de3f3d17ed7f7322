"""What the programs that test and measure share: pictures, shards, runs of the program, an S3 server, a proxy that breaks requests."""
import http.client
import http.server
import io
import os
import random
import socket
import struct
import subprocess
import threading
import time
import zlib

RUN_SECONDS_MAX = 120
# What the machine's own settings must not decide.
FOREIGN = ("CAPSIEVE_", "AWS_", "AZURE_", "GOOGLE_")


def picture(seed, width=8, height=8):
    """A PNG of noise."""
    generator = random.Random(seed)
    rows = b"".join(b"\0" + generator.randbytes(width * 3) for _ in range(height))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def megabyte(seed):
    """No picture, but as large as one: 17 of them make an output of two parts."""
    return random.Random(seed).randbytes(1 << 20)


def shard(number, rows, image=lambda seed: picture(seed, 9 + seed % 5)):
    """A Parquet file; no other number's has its captions."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    seeds = [number * 1000 + row for row in range(rows)]
    columns = {"image": [image(seed) for seed in seeds], "caption": [f"caption {seed}" for seed in seeds]}
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, row_group_size=16)
    return out.getvalue()


def environment(settings):
    """This one's without what it says of clouds, and with `settings`."""
    return {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)} | settings


def run(program, settings, *arguments, seconds=RUN_SECONDS_MAX, **more):
    """The program to its end, which is no panic."""
    command = [program, *arguments]
    done = subprocess.run(command, env=environment(settings), capture_output=True, text=True, timeout=seconds, **more)
    assert "panicked" not in done.stderr, done.stderr
    return done


def score_arguments(source, output, *more):
    return ["score", "--model", "synthetic:tiny", "--threads", "2", "--input", source, "--output", output, *more]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def step(name, work, *arguments):
    start = time.monotonic()
    work(*arguments)
    print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)


class S3:
    """A bucket on a server of this machine."""

    def __init__(self, port):
        import boto3
        self.port = port
        self.endpoint = f"http://127.0.0.1:{port}"
        self.keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        self.environment = self.keys | {"AWS_ENDPOINT_URL": self.endpoint}
        self.client = boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1",
                                   aws_access_key_id="key", aws_secret_access_key="secret")
        self.client.create_bucket(Bucket="data")
        self.root = "s3://data/"

    def put(self, key, data):
        self.client.put_object(Bucket="data", Key=key, Body=data)

    def get(self, key):
        return self.client.get_object(Bucket="data", Key=key)["Body"].read()

    def keys_below(self, prefix):
        return sorted(item["Key"] for item in self.client.list_objects_v2(Bucket="data", Prefix=prefix).get("Contents", []))

    def unfinished(self, prefix=""):
        uploads = self.client.list_multipart_uploads(Bucket="data").get("Uploads", [])
        return [upload for upload in uploads if upload["Key"].startswith(prefix)]


class Proxy:
    """Hands requests on to a server of this machine and breaks those that `fault` wants broken.

    `fault` sees each request (its `command`, `path` and `headers`, which it may change) and says what goes wrong with it:
    nothing (None), a status that is answered instead ("503"), or one of "reset before" and "reset after" (the server did
    it), "500 after", "slow", "trickling", "truncated", or a function from the answer's headers to others.
    """

    def __init__(self, upstream, fault):
        class Handler(Breaking):
            pass

        Handler.upstream, Handler.fault = upstream, staticmethod(fault)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


ANSWERS = {403: b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>",
           429: b"<Error><Code>SlowDown</Code></Error>", 503: b"<Error><Code>SlowDown</Code></Error>"}
INTERNAL_ERROR = b"<Error><Code>InternalError</Code></Error>"


class Breaking(http.server.BaseHTTPRequestHandler):
    """See `Proxy`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        raise ConnectionResetError

    def any(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        fault = self.fault(self)
        if isinstance(fault, str) and fault.isdigit():
            return self.answer(int(fault), {}, ANSWERS.get(int(fault), INTERNAL_ERROR))
        if fault == "reset before":
            self.reset()
        if fault == "slow":
            time.sleep(0.3)
        upstream = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        if fault == "reset after":
            self.reset()
        if fault == "500 after":
            return self.answer(500, {}, INTERNAL_ERROR)
        headers = {name.lower(): value for name, value in answer.getheaders()
                   if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server")}
        if callable(fault):
            headers = fault(headers)
        length = answer.getheader("content-length") if self.command == "HEAD" else None
        self.answer(answer.status, headers, data, length, fault)

    def answer(self, status, headers, data, length=None, fault=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", length or str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncated" and data:
            self.wfile.write(data[:len(data) // 2])
            self.wfile.flush()
            self.reset()
        pieces = 5 if fault == "trickling" else 1
        size = max(1, -(-len(data) // pieces))
        for start in range(0, len(data), size):
            time.sleep(0.2 if fault == "trickling" else 0)
            self.wfile.write(data[start:start + size])

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = any
