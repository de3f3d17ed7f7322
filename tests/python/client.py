"""The worker called by grpcio with stubs made from the contract, as an orchestrator does it.

    pip install grpcio grpcio-tools grpcio-health-checking grpcio-reflection googleapis-common-protos pyarrow
    python tests/python/client.py target/release/capsieve

Starts the worker itself; says what it checked; exit status 1 if something is wrong.
"""
import math
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import grpc
import pyarrow.parquet as pq
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent.parent
SHARD = ROOT / "demo" / "shard.parquet"


def stubs(folder):
    """Python modules of the contract."""
    file = "capsieve/v1/scoring.proto"
    code = protoc.main(["protoc", f"-I{ROOT}/proto", f"--python_out={folder}", f"--grpc_python_out={folder}", file])
    assert code == 0, "protoc takes the contract"
    sys.path.insert(0, folder)
    from capsieve.v1 import scoring_pb2, scoring_pb2_grpc
    return scoring_pb2, scoring_pb2_grpc


def start(program, *arguments):
    """A worker on a free port, and its address."""
    command = [program, "serve", "--device", "cpu", "--listen", "127.0.0.1:0", *arguments]
    worker = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    address = None
    for line in worker.stderr:
        if "listening on " in line:
            address = line.split("listening on ")[1].strip()
        if " serving" in line:
            break
    assert address, "the worker starts"
    threading.Thread(target=worker.stderr.read, daemon=True).start()
    return worker, address


def details(error, kind):
    """A detail of a status, or None."""
    for key, value in error.trailing_metadata():
        if key == "grpc-status-details-bin":
            for packed in status_pb2.Status.FromString(value).details:
                if packed.Is(kind.DESCRIPTOR):
                    found = kind()
                    packed.Unpack(found)
                    return found
    return None


def refused(call, code):
    """The error of a call that must fail with this code."""
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        assert error.code() == code, f"{error.code()} instead of {code}: {error.details()}"
        return error
    raise AssertionError(f"expected {code}")


def listed(messages):
    """The shards of a call: a long list goes on in further `started` messages, all at the head of the stream."""
    kinds = [message.WhichOneof("event") for message in messages]
    head = next(i for i, kind in enumerate(kinds) if kind != "started")
    assert head >= 1 and "started" not in kinds[head:], kinds
    starts = [message.started for message in messages[:head]]
    alike = [(s.model_hash, s.device, s.precision, s.request_id, s.version) for s in starts]
    assert len(set(alike)) == 1, "but for the shards they say the same"
    return [shard for start in starts for shard in start.shards]


def scores(messages):
    """(shard, row, caption) -> (itm, cosine) of a call that succeeded."""
    messages = list(messages)
    shards = listed(messages)
    assert messages[-1].WhichOneof("event") == "summary"
    found = {}
    for chunk in (m.chunk for m in messages if m.WhichOneof("event") == "chunk"):
        assert chunk.ByteSize() <= 2 << 20
        assert chunk.shard_index < max(1, len(shards))
        for i, row in enumerate(chunk.row):
            key = (chunk.shard_index, row, chunk.caption[i])
            assert key not in found, "an entry comes once"
            found[key] = (chunk.itm_score[i], chunk.cosine_score[i])
    return found, messages[-1].summary


def check_scores(pb, stub, program, folder):
    """Shards, pairs that come with the call and `capsieve score` agree."""
    output = os.path.join(folder, "scored.parquet")
    command = [program, "score", "--model", "synthetic:tiny", "--device", "cpu", "--input", SHARD, "--output", output]
    subprocess.run(command, check=True, capture_output=True)
    table = pq.read_table(output)
    want = list(zip(table["itm_score"].to_pylist(), table["cosine_score"].to_pylist()))
    shards = pb.ParquetShards(uris=[str(SHARD)])
    got, summary = scores(stub.ScoreBatch(pb.ScoreBatchRequest(shards=shards)))
    assert [got[0, row, 0] for row in range(len(want))] == want, "shards"
    assert summary.rows == summary.scored == len(want)
    rows = pq.read_table(SHARD).slice(0, 64).to_pylist()
    image = lambda row: row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
    items = [pb.ImageCaptions(image_bytes=image(row), captions=[row["caption"]]) for row in rows]
    request = pb.ScoreBatchRequest(pairs=pb.InlinePairs(items=items))
    for compression in [grpc.Compression.NoCompression, grpc.Compression.Gzip]:
        got, _ = scores(stub.ScoreBatch(request, compression=compression))
        assert [got[0, row, 0] for row in range(64)] == want[:64], "pairs"
    bad = pb.InlinePairs(items=[items[0], pb.ImageCaptions(image_bytes=b"no image", captions=["a"])])
    got, summary = scores(stub.ScoreBatch(pb.ScoreBatchRequest(pairs=bad)))
    assert got[0, 0, 0] == want[0] and math.isnan(got[0, 1, 0][0]) and summary.errors["decode_failed"] == 1


def check_prefix(pb, stub, folder):
    """Every shard below a prefix, in the order of their names, each with its own rows."""
    below = Path(folder) / "many"
    below.mkdir()
    table = pq.read_table(SHARD)
    names = [str(below / f"{number:03}.parquet") for number in range(40)]
    for number, name in enumerate(names):
        pq.write_table(table.slice(number, 1 + number % 3), name)
    messages = list(stub.ScoreBatch(pb.ScoreBatchRequest(shards=pb.ParquetShards(uris=[f"{below}/"]))))
    assert listed(messages) == names
    got, summary = scores(messages)
    want, _ = scores(stub.ScoreBatch(pb.ScoreBatchRequest(shards=pb.ParquetShards(uris=[str(SHARD)]))))
    rows = [(number, row) for number in range(40) for row in range(1 + number % 3)]
    assert sorted(got) == [(number, row, 0) for number, row in rows] and summary.shards == 40
    assert all(got[number, row, 0] == want[0, number + row, 0] for number, row in rows)


def check_resume(pb, stub):
    """A call that is cancelled goes on with its last token."""
    shards = pb.ParquetShards(uris=[str(SHARD)])
    whole, _ = scores(stub.ScoreBatch(pb.ScoreBatchRequest(shards=shards)))
    call, token, seen = stub.ScoreBatch(pb.ScoreBatchRequest(shards=shards)), b"", 0
    for message in call:
        if message.WhichOneof("event") == "chunk":
            token, seen = message.chunk.resume_token, seen + len(message.chunk.row)
            if seen > 100:
                call.cancel()
                break
    rest, _ = scores(stub.ScoreBatch(pb.ScoreBatchRequest(shards=pb.ParquetShards(uris=[str(SHARD)], resume_tokens=[token]))))
    assert sorted(rest) == sorted(whole)[seen:], "the rest, and nothing twice"


def check_sink(pb, stub, folder):
    """A scored shard with the same scores as the stream; a second call finds it done."""
    shards, output = pb.ParquetShards(uris=[str(SHARD)]), os.path.join(folder, "by-the-worker.parquet")
    request = pb.ScoreBatchRequest(shards=shards, sink=pb.ParquetSink(uri=output, drop_images=True))
    for skipped in [False, True]:
        messages = list(stub.ScoreBatch(request))
        assert not any(message.WhichOneof("event") == "chunk" for message in messages), "no scores in the stream"
        done = next(message.shard_done for message in messages if message.WhichOneof("event") == "shard_done")
        assert (done.skipped, done.output_uri, done.rows) == (skipped, output, 384), done
    streamed, _ = scores(stub.ScoreBatch(pb.ScoreBatchRequest(shards=shards)))
    table = pq.read_table(output)
    assert "image" not in table.column_names
    assert table["itm_score"].to_pylist() == [streamed[0, row, 0][0] for row in range(len(table))]


def check_refusals(pb, stub, folder):
    """Codes and details, all that a client can bring about."""
    code = grpc.StatusCode
    shard = lambda uri, **more: stub.ScoreBatch(pb.ScoreBatchRequest(shards=pb.ParquetShards(uris=[str(uri)]), **more))
    error = refused(stub.ScoreBatch(pb.ScoreBatchRequest(request_id="mine")), code.INVALID_ARGUMENT)
    assert details(error, error_details_pb2.BadRequest).field_violations[0].field == "source"
    assert details(error, error_details_pb2.RequestInfo).request_id == "mine"
    (Path(folder) / "text.parquet").write_text("no parquet")
    (Path(folder) / "taken.parquet").write_text("somebody else's")
    bad = [pb.ImageCaptions(image_bytes=b"no image", captions=["a"])]
    strict = pb.ScoreBatchRequest(pairs=pb.InlinePairs(items=bad), on_error=pb.ERROR_POLICY_FAIL)
    for call, expected, reason in [
        (shard("/etc/passwd"), code.PERMISSION_DENIED, "URI_NOT_ALLOWED"),
        (shard(SHARD.parent / "none.parquet"), code.NOT_FOUND, "NOT_FOUND"),
        (shard(f"{folder}/text.parquet"), code.FAILED_PRECONDITION, "SHARD_UNREADABLE"),
        (shard(SHARD, sink=pb.ParquetSink(uri=f"{folder}/taken.parquet")), code.ALREADY_EXISTS, "OUTPUT_EXISTS"),
        (stub.ScoreBatch(strict), code.ABORTED, "ROW_FAILED"),
    ]:
        info = details(refused(call, expected), error_details_pb2.ErrorInfo)
        assert (info.domain, info.reason) == ("capsieve", reason), info
    request = pb.ScoreBatchRequest(shards=pb.ParquetShards(uris=[str(SHARD)]))
    refused(stub.ScoreBatch(request, timeout=0.0005), code.DEADLINE_EXCEEDED)
    items = [pb.ImageCaptions(image_bytes=bytes(17 << 20), captions=["a"])]
    refused(stub.ScoreBatch(pb.ScoreBatchRequest(pairs=pb.InlinePairs(items=items))), code.RESOURCE_EXHAUSTED)
    unknown = grpc.StatusCode.UNIMPLEMENTED
    try:
        stub_of(stub, "/capsieve.v1.ScoringService/Nothing")(b"")
        raise AssertionError("a method that is not there")
    except grpc.RpcError as error:
        assert error.code() == unknown, error


def check_bad_fields(pb, stub):
    """The field that cannot be is named, by its path in the request."""
    item = lambda **more: pb.InlinePairs(items=[pb.ImageCaptions(captions=["a"], **more)])
    shards = lambda *uris, **more: pb.ParquetShards(uris=uris, **more)
    request = pb.ScoreBatchRequest
    for bad, field in [
        (request(pairs=item(), heads=[pb.HEAD_ITM, 77]), "heads[1]"),
        (request(pairs=item(), heads=[pb.HEAD_UNSPECIFIED]), "heads[0]"),
        (request(pairs=item(), on_error=9), "on_error"),
        (request(pairs=item(), thresholds=pb.Thresholds(min_itm=1.5)), "thresholds.min_itm"),
        (request(pairs=item(), thresholds=pb.Thresholds(min_cosine=math.nan)), "thresholds.min_cosine"),
        (request(pairs=item(), heads=[pb.HEAD_ITM], thresholds=pb.Thresholds(min_cosine=0)), "thresholds.min_cosine"),
        (request(pairs=pb.InlinePairs()), "pairs.items"),
        (request(pairs=item(key="k" * 5000)), "pairs.items[0].key"),
        (request(pairs=item(image_uri="")), "pairs.items[0].image_uri"),
        (request(shards=shards()), "shards.uris"),
        (request(shards=shards(str(SHARD), "")), "shards.uris[1]"),
        (request(shards=shards(str(SHARD), resume_tokens=[b"rubbish"])), "shards.resume_tokens"),
        (request(shards=shards(str(SHARD)), sink=pb.ParquetSink()), "sink.uri"),
        (request(pairs=item(), sink=pb.ParquetSink(uri="/x/y.parquet")), "sink"),
        (request(pairs=item(), request_id="x" * 300), "request_id"),
    ]:
        error = refused(stub.ScoreBatch(bad), grpc.StatusCode.INVALID_ARGUMENT)
        found = [violation.field for violation in details(error, error_details_pb2.BadRequest).field_violations]
        # A later worker may name the element of a list too.
        assert len(found) == 1 and found[0].startswith(field), (found, field)


def stub_of(stub, method):
    """A method without a stub."""
    return stub.channel.unary_unary(method)


def check_token_and_drain(pb, pb_grpc, program, folder):
    """No token, a head that is not there, one call more than --max-calls, a worker that ends: each has its code."""
    tokens = Path(folder) / "tokens"
    tokens.write_text("secret\n")
    worker, address = start(
        program, "--model", "synthetic:tiny", "--allow-uri", str(SHARD.parent), "--token-file", str(tokens),
        "--max-calls", "1", "--drain-timeout", "0", "--heads", "itm",
    )
    try:
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.ScoringServiceStub(channel)
            request = pb.ScoreBatchRequest(shards=pb.ParquetShards(uris=[str(SHARD)]))
            refused(stub.ScoreBatch(request), grpc.StatusCode.UNAUTHENTICATED)
            token = [("authorization", "Bearer secret")]
            other = pb.ScoreBatchRequest(shards=pb.ParquetShards(uris=[str(SHARD)]), heads=[pb.HEAD_COSINE])
            error = refused(stub.ScoreBatch(other, metadata=token), grpc.StatusCode.FAILED_PRECONDITION)
            assert details(error, error_details_pb2.ErrorInfo).reason == "HEAD_NOT_LOADED"
            # A call that is not read on stands still.
            many = pb.InlinePairs(items=[pb.ImageCaptions(captions=["x" * 1000]) for _ in range(10000)])
            running = stub.ScoreBatch(pb.ScoreBatchRequest(pairs=many), metadata=token)
            next(running)
            error = refused(stub.ScoreBatch(request, metadata=token), grpc.StatusCode.RESOURCE_EXHAUSTED)
            assert details(error, error_details_pb2.RetryInfo).retry_delay.seconds >= 1
            worker.terminate()
            refused(running, grpc.StatusCode.UNAVAILABLE)
    finally:
        worker.terminate()
    assert worker.wait(30) == 0


def main():
    program = os.path.abspath(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        pb, pb_grpc = stubs(folder)
        worker, address = start(program, "--model", "synthetic:tiny", "--allow-uri", f"{SHARD.parent},{folder}")
        try:
            with grpc.insecure_channel(address) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                answer = health.Check(health_pb2.HealthCheckRequest(service="capsieve.v1.ScoringService"))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                services = ProtoReflectionDescriptorDatabase(channel).get_services()
                assert "capsieve.v1.ScoringService" in services, services
                stub = pb_grpc.ScoringServiceStub(channel)
                stub.channel = channel
                assert stub.GetModelInfo(pb.GetModelInfoRequest()).image_size == 64
                check_scores(pb, stub, program, folder)
                check_prefix(pb, stub, folder)
                check_resume(pb, stub)
                check_sink(pb, stub, folder)
                check_refusals(pb, stub, folder)
                check_bad_fields(pb, stub)
        finally:
            worker.terminate()
        assert worker.wait(30) == 0, "the worker drains and ends"
        check_token_and_drain(pb, pb_grpc, program, folder)
    print("grpcio: health, reflection, scores by every way in, sink, resume, refusals, drain: as the contract says")


if __name__ == "__main__":
    main()
