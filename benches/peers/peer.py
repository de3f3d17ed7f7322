"""One peer in a process of its own, for compare.py: it scores when it is told to, and sleeps in between.

    python benches/peers/peer.py make onnx|onnx-int8|openvino|openvino-int8 --model DIR --work DIR
    python benches/peers/peer.py run NAME --model DIR --work DIR --threads 2

`make` writes what a runtime loads, if it is not there. `run` loads NAME of PEERS, says `ready`, and for each line of its input, a batch
size, scores all rows and answers with JSON: seconds of the forward passes, scores, the process's peak memory.
"""
import argparse
import json
import os
import resource
import sys
import time

# Network and Eager take pixels as bytes, give both scores, and share the image pass.
import gpu
import numpy as np
import torch

# Calibrated on rows of their own, see compare.py.
CALIBRATION_BATCH = 2


def batches(work, size, name="rows"):
    """Pixels, token ids and mask of each batch, padded to its longest caption."""
    data = np.load(os.path.join(work, name + ".npz"))
    pixels, ids, lengths = data["pixels"], data["ids"], data["lengths"]
    for first in range(0, len(pixels), size):
        of = slice(first, first + size)
        longest = lengths[of].max()
        mask = (np.arange(longest) < lengths[of, None]).astype(np.int64)
        yield pixels[of], ids[of, :longest] * mask, mask


class TwoCalls(gpu.Eager):
    """The model card's way: the whole model once for each head."""

    def forward(self, pixels, ids, mask):
        x = (pixels.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        itm = self.model(pixel_values=x, input_ids=ids, attention_mask=mask)[0].float().softmax(1)[:, 1]
        cosine = self.model(pixel_values=x, input_ids=ids, attention_mask=mask, use_itm_head=False)[0]
        return itm, cosine.float().diagonal()


def torch_peer(variant, dtype, int8=False):
    def load(a):
        torch.set_num_threads(a.threads)
        if variant == "two calls":
            network = TwoCalls(a.model, dtype)
        else:
            network = gpu.load(a.model, variant, dtype, "cpu")
        if int8:
            network = torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear}, dtype=torch.qint8)

        @torch.inference_mode()
        def score(*batch):
            return [x.float().numpy() for x in network(*map(torch.from_numpy, batch))]
        return score
    return load


def onnx_peer(file):
    def load(a):
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = a.threads
        session = onnxruntime.InferenceSession(os.path.join(a.work, file), options, ["CPUExecutionProvider"])
        names = [x.name for x in session.get_inputs()]
        return lambda *batch: session.run(None, dict(zip(names, batch)))
    return load


def openvino_peer(file, precision):
    def load(a):
        import openvino
        hints = {"INFERENCE_NUM_THREADS": a.threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        model = openvino.Core().compile_model(os.path.join(a.work, file), "CPU", hints)

        def score(*batch):
            out = model(batch)
            return [out[0], out[1]]
        return score
    return load


F32, BF16 = torch.float32, torch.bfloat16
PEERS = {
    "transformers two calls f32": torch_peer("two calls", F32),
    "transformers eager f32": torch_peer("eager", F32),
    "transformers sdpa f32": torch_peer("sdpa", F32),
    "transformers compiled f32": torch_peer("compile", F32),
    "onnxruntime f32": onnx_peer("f32.onnx"),
    "openvino f32": openvino_peer("f32.xml", "f32"),
    "transformers eager bf16": torch_peer("eager", BF16),
    "transformers sdpa bf16": torch_peer("sdpa", BF16),
    "transformers compiled bf16": torch_peer("compile", BF16),
    "openvino bf16": openvino_peer("f32.xml", "bf16"),
    "transformers dynamic int8": torch_peer("eager", F32, int8=True),
    "onnxruntime dynamic int8": onnx_peer("int8.onnx"),
    "openvino int8": openvino_peer("int8.xml", "f32"),
    "openvino int8 and bf16": openvino_peer("int8.xml", "bf16"),
}
# What each needs beside the checkpoint.
NEEDS = {"onnxruntime f32": ["onnx"], "onnxruntime dynamic int8": ["onnx", "onnx-int8"],
         "openvino f32": ["openvino"], "openvino bf16": ["openvino"],
         "openvino int8": ["openvino", "openvino-int8"], "openvino int8 and bf16": ["openvino", "openvino-int8"]}


# What `make` writes.
MAKES = {"onnx": "f32.onnx", "onnx-int8": "int8.onnx", "openvino": "f32.xml", "openvino-int8": "int8.xml"}


def make(a):
    path = {name: os.path.join(a.work, name) for name in MAKES.values()}
    if os.path.exists(path[MAKES[a.what]]):
        return
    if a.what == "onnx":
        example = tuple(map(torch.from_numpy, next(batches(a.work, 2))))
        images, tokens = torch.export.Dim("images", min=1, max=64), torch.export.Dim("tokens", min=3, max=512)
        torch.onnx.export(gpu.load(a.model, "sdpa", F32, "cpu"), example, path["f32.onnx"], dynamo=True, external_data=True,
                          input_names=["pixels", "ids", "mask"],
                          dynamic_shapes=({0: images}, {0: images, 1: tokens}, {0: images, 1: tokens}))
    elif a.what == "onnx-int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic
        quantize_dynamic(path["f32.onnx"], path["int8.onnx"], per_channel=True, weight_type=QuantType.QInt8,
                         op_types_to_quantize=["MatMul", "Gemm"], use_external_data_format=True)
    elif a.what == "openvino":
        import openvino
        example = tuple(map(torch.from_numpy, next(batches(a.work, 2))))
        size = example[0].shape[1]
        shapes = [[-1, size, size, 3], [-1, -1], [-1, -1]]
        model = openvino.convert_model(gpu.load(a.model, "sdpa", F32, "cpu"), example_input=example, input=shapes)
        openvino.save_model(model, path["f32.xml"], compress_to_fp16=False)
    else:
        import nncf
        import openvino
        data = nncf.Dataset(list(batches(a.work, CALIBRATION_BATCH, "calibration")))
        model = nncf.quantize(openvino.Core().read_model(path["f32.xml"]), data, model_type=nncf.ModelType.TRANSFORMER,
                              fast_bias_correction=True)
        openvino.save_model(model, path["int8.xml"], compress_to_fp16=False)


def run(a):
    score = PEERS[a.what](a)
    print("ready", flush=True)
    seen = set()
    for line in sys.stdin:
        rows = list(batches(a.work, int(line)))
        # Kernels are chosen, or compiled, with the first batch of a shape.
        for batch in rows:
            if (shape := (line, batch[1].shape)) not in seen:
                score(*batch)
                seen.add(shape)
        start = time.perf_counter()
        scores = [np.stack(score(*batch), 1) for batch in rows]
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"seconds": seconds, "scores": np.concatenate(scores).tolist(), "peak_kb": peak}), flush=True)


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("action", choices=["make", "run"])
    args.add_argument("what")
    args.add_argument("--model", required=True)
    args.add_argument("--work", required=True, help="folder of rows.npz, and of what `make` writes")
    args.add_argument("--threads", type=int, default=os.cpu_count())
    a = args.parse_args()
    (make if a.action == "make" else run)(a)


if __name__ == "__main__":
    main()
