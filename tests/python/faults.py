"""What goes wrong at the worst moment: each request of an upload, objects that change, full disks, answers that are lost.

    pip install 'moto[s3,server]' boto3 pyarrow
    python tests/python/faults.py target/release/capsieve

Whatever fails is named in one line, costs no other shard, leaves nothing half-written and no parts of uploads behind; the same
command then completes, and every row is there once.
"""
import concurrent.futures
import functools
import io
import itertools
import logging
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

import pyarrow.parquet as pq
from moto.server import ThreadedMotoServer

import support
from support import S3, Proxy, megabyte, shard, step

PROGRAM = Path(sys.argv[1]).resolve()
SHARDS = {f"{number:05}.parquet": 40 + number for number in range(4)}
VICTIM = "00002.parquet"
# Parts are of 16 MiB.
LARGE_ROWS, LARGE_PARTS = 34, 3
# Longer than a store sheds load for a moment, shorter than any patience with it.
OUTAGE_SECONDS = 5
run = functools.partial(support.run, PROGRAM)


def score(settings, source, output, *more, **limits):
    return run(settings, *support.score_arguments(source, output, *more), **limits)


class Bucket:
    """The bucket, through a proxy or not, and prefixes in it for each test's outputs."""

    numbers = itertools.count()

    def __init__(self, s3):
        self.s3 = s3
        for number, (name, count) in enumerate(SHARDS.items()):
            s3.put(f"in/{name}", shard(number, count))
        # A file, for the bucket is slow.
        self.folder = tempfile.TemporaryDirectory()
        self.large = Path(self.folder.name, "large.parquet")
        self.large.write_bytes(shard(9, LARGE_ROWS, megabyte))

    def prefix(self):
        return f"out{next(self.numbers)}/"

    def through(self, proxy):
        return self.s3.keys | {"AWS_ENDPOINT_URL": proxy.endpoint}

    def is_whole(self, prefix, names):
        """These shards are there with every row once, and nothing else but their statistics."""
        shards = [key for key in self.s3.keys_below(prefix) if not key.endswith(".stats.json")]
        assert shards == [f"{prefix}{name}" for name in sorted(names)], shards
        for name in names:
            table = pq.read_table(io.BytesIO(self.s3.get(f"{prefix}{name}")))
            captions = table["caption"].to_pylist()
            assert len(set(captions)) == len(captions) == SHARDS[name], name
            assert table["itm_score"].null_count == 0, name
        assert self.s3.unfinished(prefix) == [], "a run that ended by itself leaves no upload"

    def large_is_whole(self, key):
        source, output = pq.read_table(self.large), pq.read_table(io.BytesIO(self.s3.get(key)))
        assert output["image"] == source["image"] and output["caption"] == source["caption"], key
        assert self.s3.unfinished(key) == []

    def completes(self, prefix):
        """The same command without the fault."""
        ran = score(self.s3.environment, "s3://data/in/", f"s3://data/{prefix}")
        assert ran.returncode == 0, ran
        self.is_whole(prefix, SHARDS)


def key_of(request):
    return urllib.parse.unquote(urllib.parse.urlsplit(request.path).path).removeprefix("/data/")


def query_of(request):
    return urllib.parse.parse_qs(urllib.parse.urlsplit(request.path).query, keep_blank_values=True)


def one_line(ran, *words):
    """The job failed and says why in a line for each shard and one for the job."""
    assert ran.returncode == 1, ran
    assert all(word in ran.stderr for word in words), (words, ran.stderr)
    # Beside those of progress, which are there when it takes long.
    lines = [line for line in ran.stderr.splitlines() if " INFO " not in line]
    assert "panicked" not in ran.stderr and len(lines) <= 3, ran.stderr


def costs_one_shard(bucket, fault, *words):
    """A run over all shards fails on the victim alone, and the next one completes."""
    prefix = bucket.prefix()
    with Proxy(bucket.s3.port, fault) as proxy:
        ran = score(bucket.through(proxy), "s3://data/in/", f"s3://data/{prefix}")
    one_line(ran, f"in/{VICTIM}", *words)
    assert f"{len(SHARDS) - 1} scored" in ran.stdout and "1 failed" in ran.stdout, ran.stdout
    bucket.is_whole(prefix, [name for name in SHARDS if name != VICTIM])
    return prefix


def replaced(bucket):
    """The object is another one between its footer and its rows; then the new one is scored."""
    reads, before = itertools.count(), bucket.s3.get(f"in/{VICTIM}")

    def fault(request):
        if request.command == "GET" and key_of(request) == f"in/{VICTIM}" and next(reads) == 1:
            bucket.s3.put(f"in/{VICTIM}", shard(7, SHARDS[VICTIM]))

    prefix = costs_one_shard(bucket, fault, "replaced")
    assert next(reads) >= 2, "the rows were read after the footer"
    bucket.completes(prefix)
    found = pq.read_table(io.BytesIO(bucket.s3.get(f"{prefix}{VICTIM}")))["caption"].to_pylist()
    assert found == [f"caption {7000 + row}" for row in range(SHARDS[VICTIM])]
    bucket.s3.put(f"in/{VICTIM}", before)


def other_tags(bucket):
    """A server that knows no conditions and tags each answer otherwise."""
    tags = itertools.count()

    def fault(request):
        if key_of(request) != f"in/{VICTIM}":
            return None
        del request.headers["if-match"]
        return lambda headers: headers | {"etag": f'"{next(tags):032}"'}

    bucket.completes(costs_one_shard(bucket, fault, "replaced"))


def no_tags(bucket):
    """A web server without entity tags: another version shows by its time."""
    bucket.s3.client.put_object_acl(Bucket="data", Key=f"in/{VICTIM}", ACL="public-read")
    for changes in (False, True):
        requests = itertools.count()

        def answer(headers):
            kept = {name: value for name, value in headers.items() if name.lower() not in ("etag", "last-modified")}
            # The size, the footer, and then the rows.
            return kept | {"last-modified": f"Sat, 28 Nov 2026 10:00:0{int(changes and next(requests) > 1)} GMT"}

        def fault(request):
            del request.headers["if-match"]
            return answer

        with tempfile.TemporaryDirectory() as folder, Proxy(bucket.s3.port, fault) as proxy:
            output = Path(folder, "out.parquet")
            ran = score(bucket.s3.environment, f"{proxy.endpoint}/data/in/{VICTIM}", str(output))
            if changes:
                one_line(ran, f"in/{VICTIM}", "replaced")
                assert next(requests) >= 3 and not output.exists()
            else:
                assert ran.returncode == 0 and pq.read_table(output).num_rows == SHARDS[VICTIM], ran


def forbidden(bucket):
    """One object among many may not be read; one output may not be written."""
    bucket.completes(costs_one_shard(bucket, lambda request: "403" if key_of(request) == f"in/{VICTIM}" else None, "permission denied"))
    prefix = bucket.prefix()
    fault = lambda request: "403" if request.command == "PUT" and key_of(request).endswith(f"/{VICTIM}") else None  # noqa: E731
    with Proxy(bucket.s3.port, fault) as proxy:
        ran = score(bucket.through(proxy), "s3://data/in/", f"s3://data/{prefix}")
    one_line(ran, f"{prefix}{VICTIM}", "permission denied")
    bucket.is_whole(prefix, [name for name in SHARDS if name != VICTIM])
    bucket.completes(prefix)


def cut_bodies(bucket):
    """Every answer with bytes of one object is cut in the middle, again and again."""
    fault = lambda request: "truncated" if request.command == "GET" and key_of(request) == f"in/{VICTIM}" else None  # noqa: E731
    prefix = costs_one_shard(bucket, fault)
    bucket.completes(prefix)
    # An output that was to be replaced is no answer to a run that could not read its rows.
    reads = itertools.count()
    late = lambda request: fault(request) if next(reads) > 0 else None  # noqa: E731
    rows = lambda request: late(request) if request.command == "GET" and key_of(request) == f"in/{VICTIM}" else None  # noqa: E731
    with Proxy(bucket.s3.port, rows) as proxy:
        ran = score(bucket.through(proxy), f"s3://data/in/{VICTIM}", f"s3://data/{prefix}{VICTIM}", "--overwrite")
    one_line(ran, f"in/{VICTIM}")


def slow_bodies(bucket):
    """Bytes that come in drops are waited for."""
    prefix = bucket.prefix()
    with Proxy(bucket.s3.port, lambda request: "trickling" if request.command == "GET" else None) as proxy:
        ran = score(bucket.through(proxy), "s3://data/in/", f"s3://data/{prefix}")
    assert ran.returncode == 0, ran
    bucket.is_whole(prefix, SHARDS)


def outage(bucket):
    """Everything fails for some seconds: the run goes on behind them. Listing that never works is an error of the job."""
    prefix, end = bucket.prefix(), time.monotonic() + OUTAGE_SECONDS
    with Proxy(bucket.s3.port, lambda request: "503" if time.monotonic() < end else None) as proxy:
        ran = score(bucket.through(proxy), "s3://data/in/", f"s3://data/{prefix}")
    assert ran.returncode == 0, ran
    assert time.monotonic() > end, "it began before the end of the outage"
    bucket.is_whole(prefix, SHARDS)


def listing_never_works(bucket):
    prefix = bucket.prefix()
    with Proxy(bucket.s3.port, lambda request: "500" if "list-type" in query_of(request) else None) as proxy:
        ran = score(bucket.through(proxy), "s3://data/in/", f"s3://data/{prefix}")
    one_line(ran, "s3://data/in/", "500")
    assert bucket.s3.keys_below(prefix) == []


def is_part(number):
    return lambda request: request.command == "PUT" and query_of(request).get("partNumber") == [str(number)]


def is_completion(request):
    return request.command == "POST" and "uploadId" in query_of(request)


class Once:
    """Does something at the first request of a kind that comes after others of another, and breaks it."""

    def __init__(self, is_it, then, after=None):
        self.is_it, self.then, self.after, self.lock, self.seen = is_it, then, after, threading.Lock(), 0

    def __call__(self, request):
        with self.lock:
            if self.after and self.after(request):
                self.after = None
            elif not self.after and self.is_it(request):
                self.seen += 1
                return self.then() if callable(self.then) else self.then
            return None


def broken_uploads(bucket):
    """Each request that makes an output of several parts is refused for good; the same command then completes."""
    moments = [(f"part {number}", Once(is_part(number), "403")) for number in range(1, LARGE_PARTS + 1)]
    moments += [
        ("the beginning", Once(lambda request: request.command == "POST" and "uploads" in query_of(request), "403")),
        # The upload looks whether somebody was faster.
        ("between the last part and the completion", Once(lambda request: request.command == "HEAD", "403", after=is_part(LARGE_PARTS))),
        ("the completion", Once(is_completion, "403")),
    ]
    for name, fault in moments:
        key = f"{bucket.prefix()}a.parquet"
        with Proxy(bucket.s3.port, fault) as proxy:
            ran = score(bucket.through(proxy), bucket.large, f"s3://data/{key}")
        assert fault.seen > 0, f"{name}: no such request"
        one_line(ran, key, "permission denied")
        assert bucket.s3.keys_below(key) == [] and bucket.s3.unfinished(key) == [], name
        ran = score(bucket.s3.environment, bucket.large, f"s3://data/{key}")
        assert ran.returncode == 3 and f"decode_failed {LARGE_ROWS}" in ran.stdout, (name, ran)
        bucket.large_is_whole(key)


def lost_answers(bucket):
    """The server did it, and the connection broke before it could say so. What came of it is whole, and is recognised."""
    small = bucket.large.with_name("small.parquet")
    small.write_bytes(bucket.s3.get(f"in/{VICTIM}"))
    for source, code, is_it in [(bucket.large, 3, is_completion), (small, 0, lambda request: request.command == "PUT")]:
        key = f"{bucket.prefix()}a.parquet"
        fault = Once(lambda request: is_it(request) and key_of(request) == key, "reset after")
        once = lambda request: fault(request) if fault.seen == 0 else None  # noqa: E731
        with Proxy(bucket.s3.port, once) as proxy:
            first = score(bucket.through(proxy), source, f"s3://data/{key}")
        assert fault.seen == 1, source
        assert first.returncode == code, first
        again = score(bucket.s3.environment, source, f"s3://data/{key}")
        assert again.returncode == code and "is already complete" in again.stdout, again
        assert bucket.s3.unfinished(key) == [], source
        before, after = pq.read_table(source), pq.read_table(io.BytesIO(bucket.s3.get(key)))
        assert after["caption"] == before["caption"] and after["image"] == before["image"], source


def killed_uploads(bucket):
    """Killed when all parts are there: before the completion there is no output, behind it there is a whole one."""
    for fault_kind in ("reset before", "reset after"):
        key = f"{bucket.prefix()}a.parquet"
        command = [PROGRAM, *support.score_arguments(bucket.large, f"s3://data/{key}")]
        done = threading.Event()
        worker = None

        def fault(request):
            if not is_completion(request):
                return None
            if fault_kind == "reset before":
                worker.kill()
            done.set()
            return fault_kind

        with Proxy(bucket.s3.port, fault) as proxy:
            worker = subprocess.Popen(command, env=support.environment(bucket.through(proxy)), stderr=subprocess.DEVNULL)
            assert done.wait(60), "it is never completed"
            if fault_kind == "reset after":
                while bucket.s3.keys_below(key) == []:
                    time.sleep(0.01)
            worker.kill()
            worker.wait()
        if fault_kind == "reset before":
            assert bucket.s3.keys_below(key) == [], "no part of an upload is an output"
        again = score(bucket.s3.environment, bucket.large, f"s3://data/{key}")
        assert again.returncode == 3, again
        # What a killed run began is left to the bucket's lifecycle rule.
        for upload in bucket.s3.unfinished(key):
            bucket.s3.client.abort_multipart_upload(Bucket="data", Key=upload["Key"], UploadId=upload["UploadId"])
        bucket.large_is_whole(key)


def full_disk(bucket):
    """No file may be larger than a megabyte, as on a disk that is full; and a disk that is, where one can be made."""
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
               # Python ignores SIGXFSZ, and so does what it starts: the write fails instead.
               "restore_signals": False}
    with tempfile.TemporaryDirectory() as folder:
        source, output = bucket.large, Path(folder, "out")
        output.mkdir()
        fails_and_completes(source, output, limited, lambda: None)
        if os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", output], capture_output=True).returncode == 0:
            try:
                grow = ["mount", "-o", "remount,size=80m", output]
                fails_and_completes(source, output, {}, lambda: subprocess.run(grow, check=True))
            finally:
                subprocess.run(["umount", output], check=True)
        else:
            print("  skipped: no file system can be mounted here")


def fails_and_completes(source, output, limits, relieve):
    target = output / "out.parquet"
    ran = score({}, source, target, **limits)
    one_line(ran, "out.parquet", "the disk is full or a quota is reached")
    assert list(output.iterdir()) == [], list(output.iterdir())
    relieve()
    ran = score({}, source, target)
    assert ran.returncode == 3, ran
    assert pq.read_table(target)["image"] == pq.read_table(source)["image"]
    [path.unlink() for path in output.iterdir()]


def main():
    # The server is surprised by parts that come to an upload which was given up.
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    bucket = Bucket(S3(server.get_host_and_port()[1]))
    tests = [("entity tags that change", other_tags), ("no entity tags", no_tags), ("what is forbidden", forbidden),
             ("uploads that are refused", broken_uploads), ("answers that are lost", lost_answers),
             ("uploads that are killed", killed_uploads), ("a full disk", full_disk)]
    # These wait for most of their time.
    patient = [("a listing that never works", listing_never_works), ("bodies that are cut", cut_bodies),
               ("bodies that are slow", slow_bodies), ("an outage", outage)]
    with concurrent.futures.ThreadPoolExecutor(len(patient)) as threads:
        running = [threads.submit(step, f"faults: {name}", work, bucket) for name, work in patient]
        for name, work in tests:
            step(f"faults: {name}", work, bucket)
        [one.result() for one in running]
    # The others read that object too.
    step("faults: an object that is replaced", replaced, bucket)
    server.stop()
    print("ok")


main()
