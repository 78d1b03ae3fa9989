"""What Triton's public client examples call, against a repository such as theirs: docs/models.md has the table.

The examples are src/python/examples of triton-inference-server/client; each test is named after those that it stands
for, and calls what they call in the same way.
"""

import asyncio
import queue
import uuid

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
import tritonclient.grpc.model_config_pb2 as triton_config
import tritonclient.utils.shared_memory as shm
from google.protobuf import text_format
from tritonclient import utils
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests import triton_models
from tests.system import processes

pytestmark = pytest.mark.both_engines

SIXTEEN = np.arange(16, dtype=np.int32).reshape(1, 16)
ONES = np.ones((1, 16), np.int32)


@pytest.fixture(scope="module")
def address(engine, tmp_path_factory):
    """Of a router over one worker that serves the examples."""
    repository = triton_models.build(tmp_path_factory.mktemp("repository"))
    worker = processes.start("services.inference", models=repository, engine=engine, threads=1)
    router = processes.start("router", workers=worker.address, engine=engine)
    yield router.address
    processes.stop(router, worker)


@pytest.fixture
def stub(address):
    with grpc.insecure_channel(address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensors(*arrays):
    """INPUT0 and INPUT1, and what is asked for."""
    inputs = []
    for number, array in enumerate(arrays):
        kind = utils.np_to_triton_dtype(array.dtype)
        inputs.append(triton.InferInput(f"INPUT{number}", array.shape, kind))
        inputs[-1].set_data_from_numpy(array)
    return inputs, [triton.InferRequestedOutput(f"OUTPUT{number}") for number in range(len(arrays))]


def assert_sums(result, first=SIXTEEN, second=ONES):
    assert result.as_numpy("OUTPUT0").astype(np.int32).tolist() == (first + second).tolist()
    assert result.as_numpy("OUTPUT1").astype(np.int32).tolist() == (first - second).tolist()


def test_simple_grpc_health_metadata(client):
    assert client.is_server_live(headers={"test": "1", "dummy": "2"})
    assert client.is_server_ready()
    assert client.is_model_ready("simple")
    # The example expects "triton", and ends here.
    assert client.get_server_metadata().name == "ringmesh"
    assert client.get_model_metadata("simple", headers={"test": "1", "dummy": "2"}).name == "simple"
    with pytest.raises(InferenceServerException, match="Request for unknown model"):
        client.get_model_metadata("wrong_model_name")
    assert client.get_model_config("simple").config.name == "simple"


@pytest.mark.parametrize("name", triton_models.CONFIGS)
def test_the_configuration_of_each_example_model_is_told_as_it_was_given(client, name):
    told = client.get_model_config(name).config
    given = triton_config.ModelConfig()
    text_format.Parse(triton_models.CONFIGS[name], given)
    assert (list(told.input), list(told.output)) == (list(given.input), list(given.output))
    assert told.max_batch_size == given.max_batch_size
    assert list(told.sequence_batching.control_input) == list(given.sequence_batching.control_input)
    # As in Triton, which tells what it takes for a field that is not set.
    idle = 1_000_000 if given.HasField("sequence_batching") else 0
    assert told.sequence_batching.max_sequence_idle_microseconds == (
        given.sequence_batching.max_sequence_idle_microseconds or idle
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keepalive_options": triton.KeepAliveOptions(2**31 - 1, 20000, False, 2)},
        {
            "channel_args": [
                ("grpc.max_send_message_length", 1 << 20),
                ("grpc.max_receive_message_length", 1 << 20),
                ("grpc.http2.max_pings_without_data", 2),
                ("grpc.dns_enable_srv_queries", 1),
            ]
        },
    ],
    ids=["infer", "keepalive", "custom_args"],
)
def test_simple_grpc_infer_keepalive_and_custom_args_client(address, options):
    with triton.InferenceServerClient(address, **options) as client:
        inputs, outputs = tensors(SIXTEEN, ONES)
        assert_sums(client.infer("simple", inputs, outputs=outputs, headers={"test": "1"}))
        assert_sums(client.infer("simple", inputs, outputs=None, compression_algorithm="gzip"))
        statistics = client.get_inference_statistics("simple")
        assert len(statistics.model_stats) == 1
        with pytest.raises(InferenceServerException, match="Request for unknown model"):
            client.get_inference_statistics("wrong_model_name")


def test_memory_growth_test(address):
    for _ in range(10):
        with triton.InferenceServerClient(address) as client:
            assert_sums(client.infer("simple", tensors(SIXTEEN, ONES)[0]))


def test_simple_grpc_async_infer_client(client):
    inputs, outputs = tensors(SIXTEEN, ONES)
    answers: queue.Queue = queue.Queue()
    for _ in range(4):
        client.async_infer("simple", inputs, lambda result, error: answers.put((result, error)), outputs=outputs)
    for _ in range(4):
        result, error = answers.get(timeout=60)
        assert error is None
        assert_sums(result)


async def test_simple_grpc_aio_infer_client(address):
    inputs, outputs = tensors(SIXTEEN, ONES)
    async with triton_aio.InferenceServerClient(address) as client:
        results = await asyncio.gather(*(client.infer("simple", inputs, outputs=outputs) for _ in range(4)))
        for result in results:
            assert_sums(result)
        assert len((await client.get_inference_statistics("simple")).model_stats) == 1


def test_grpc_explicit_int_content_client(stub):
    request = explicit("simple", "INT32")
    for tensor, values in zip(request.inputs, (range(16), [1] * 16), strict=True):
        tensor.contents.int_contents.extend(values)
    response = stub.ModelInfer(request)
    found = [np.frombuffer(raw, np.int32).tolist() for raw in response.raw_output_contents]
    assert found == [[n + 1 for n in range(16)], [n - 1 for n in range(16)]]


def test_grpc_explicit_int8_content_client(stub):
    request = explicit("simple_int8", "INT8")
    for tensor, values in zip(request.inputs, (range(16), [1] * 16), strict=True):
        tensor.contents.int_contents.extend(values)
    response = stub.ModelInfer(request)
    found = [np.frombuffer(raw, np.int8).tolist() for raw in response.raw_output_contents]
    assert found == [[n + 1 for n in range(16)], [n - 1 for n in range(16)]]


def test_grpc_explicit_byte_content_client(stub):
    request = explicit("simple_string", "BYTES")
    for tensor, values in zip(request.inputs, (range(16), [1] * 16), strict=True):
        tensor.contents.bytes_contents.extend(str(value).encode() for value in values)
    response = stub.ModelInfer(request)
    found = [[int(text) for text in utils.deserialize_bytes_tensor(raw)] for raw in response.raw_output_contents]
    assert found == [[n + 1 for n in range(16)], [n - 1 for n in range(16)]]


def explicit(name, datatype):
    request = service_pb2.ModelInferRequest(model_name=name)
    for number in (0, 1):
        request.inputs.add(name=f"INPUT{number}", datatype=datatype, shape=[1, 16])
        request.outputs.add(name=f"OUTPUT{number}")
    return request


def test_contents_that_are_empty_beside_raw_ones_are_accepted(stub):
    request = explicit("simple", "INT32")
    for tensor, values in zip(request.inputs, (SIXTEEN, ONES), strict=True):
        tensor.contents.SetInParent()
        request.raw_input_contents.append(values.tobytes())
    assert len(stub.ModelInfer(request).raw_output_contents) == 2


def texts(array):
    return np.array([str(value).encode() for value in array.ravel()], np.object_).reshape(array.shape)


def test_simple_grpc_string_infer_client(client):
    inputs, outputs = tensors(texts(SIXTEEN), texts(ONES))
    assert_sums(client.infer("simple_string", inputs, outputs=outputs))
    for array in (
        np.array([[b"he\0llo", b"", "\N{GREEK SMALL LETTER ALPHA}".encode()]], np.object_),
        np.array([[b"1", b"2"]], np.bytes_),
    ):
        (tensor,), outputs = tensors(array)
        found = client.infer("simple_identity", [tensor], outputs=outputs).as_numpy("OUTPUT0")
        assert found.tolist() == array.tolist()


def test_bytes_that_are_no_text_are_refused_where_the_python_backend_would_take_them(client):
    (tensor,), outputs = tensors(np.array([[b"\xff"]], np.object_))
    with pytest.raises(InferenceServerException, match="ONNX strings are UTF-8"):
        client.infer("simple_identity", [tensor], outputs=outputs)


@pytest.fixture
def regions(client):
    """Four regions of the given size: regions(128)."""
    client.unregister_system_shared_memory()
    handles = []

    def create(size):
        for name in ("input0", "input1", "output0", "output1"):
            key = f"/ringmesh_{name}_{uuid.uuid4().hex}"
            handles.append(shm.create_shared_memory_region(name, key, size))
            client.register_system_shared_memory(name, key, size)
        return handles

    yield create
    client.unregister_system_shared_memory()
    for handle in handles:
        shm.destroy_shared_memory_region(handle)


def through(names, inputs, outputs, size):
    for tensor, name in zip((*inputs, *outputs), names, strict=True):
        tensor.set_shared_memory(name, size)


def read(handle, result, name):
    output = result.get_output(name)
    return shm.get_contents_as_numpy(handle, utils.triton_to_np_dtype(output.datatype), output.shape)


def test_simple_grpc_shm_and_reuse_infer_objects_client(client, regions):
    handles = regions(64)
    shm.set_shared_memory_region(handles[0], [SIXTEEN])
    shm.set_shared_memory_region(handles[1], [ONES])
    inputs, outputs = tensors(SIXTEEN, 2 * ONES)
    for shared in (True, False, True):
        if shared:
            through(("input0", "input1", "output0", "output1"), inputs, outputs, 64)
        else:
            for output in outputs:
                output.unset_shared_memory()
            inputs = tensors(SIXTEEN, 2 * ONES)[0]
        result = client.infer("simple", inputs, outputs=outputs)
        if shared:
            assert read(handles[2], result, "OUTPUT0").tolist() == (SIXTEEN + ONES).tolist()
            assert read(handles[3], result, "OUTPUT1").tolist() == (SIXTEEN - ONES).tolist()
        else:
            assert_sums(result, SIXTEEN, 2 * ONES)
    assert len(client.get_system_shared_memory_status().regions) == 4


def test_simple_grpc_shm_string_client(client, regions):
    handles = regions(256)
    raws = [utils.serialize_byte_tensor(texts(array)) for array in (SIXTEEN, ONES)]
    inputs, outputs = tensors(texts(SIXTEEN), texts(ONES))
    through(("input0", "input1", "output0", "output1"), inputs, outputs, 256)
    for tensor, name, handle, raw in zip(inputs, ("input0", "input1"), handles, raws, strict=False):
        shm.set_shared_memory_region(handle, [raw])
        tensor.set_shared_memory(name, utils.serialized_byte_size(raw))
    result = client.infer("simple_string", inputs, outputs=outputs)
    assert read(handles[2], result, "OUTPUT0").tolist() == texts(SIXTEEN + ONES).tolist()
    assert read(handles[3], result, "OUTPUT1").tolist() == texts(SIXTEEN - ONES).tolist()


def test_simple_grpc_cudashm_client(client):
    client.unregister_cuda_shared_memory()
    with pytest.raises(InferenceServerException) as caught:
        client.register_cuda_shared_memory("input0_data", b"aGFuZGxl", 0, 64)
    assert "UNIMPLEMENTED" in caught.value.status()


VALUES = [11, 7, 5, 3, 2, 0, 1]
SEQUENCES = [(0, 1), (100, -1), (20, -1)]


def sequence(first, sign):
    return [first] + [sign * value for value in VALUES]


def expected(values, end=0):
    """The model adds START, and END times the id where it knows of it."""
    return [values[0] + 1, *values[1:-1], values[-1] + end]


def step(value):
    tensor = triton.InferInput("INPUT", [1, 1], "INT32")
    tensor.set_data_from_numpy(np.full((1, 1), value, np.int32))
    return [tensor]


@pytest.mark.parametrize("model", ["simple_sequence", "simple_dyna_sequence"])
def test_simple_grpc_sequence_sync_infer_client(client, model):
    dyna = model == "simple_dyna_sequence"
    ids = [1000, 1001, "1002" if dyna else str(uuid.uuid4())]
    for sequence_id, (first, sign) in zip(ids, SEQUENCES, strict=True):
        values = sequence(first, sign)
        found = [
            client.infer(
                model,
                step(value),
                sequence_id=sequence_id,
                sequence_start=place == 0,
                sequence_end=place == len(values) - 1,
            ).as_numpy("OUTPUT")[0][0]
            for place, value in enumerate(values)
        ]
        assert found == expected(values, int(sequence_id) if dyna else 0)


@pytest.mark.parametrize("model", ["simple_sequence", "simple_dyna_sequence"])
def test_simple_grpc_sequence_stream_infer_client(client, model):
    dyna = model == "simple_dyna_sequence"
    ids = [2000, 2001, "2002"]
    answers: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for sequence_id, (first, sign) in zip(ids, SEQUENCES, strict=True):
        values = sequence(first, sign)
        for place, value in enumerate(values):
            client.async_stream_infer(
                model,
                step(value),
                request_id=f"{sequence_id}_{place}",
                sequence_id=sequence_id,
                sequence_start=place == 0,
                sequence_end=place == len(values) - 1,
            )
    client.stop_stream()
    found = {str(sequence_id): [] for sequence_id in ids}
    while not answers.empty():
        result, error = answers.get()
        assert error is None
        found[result.get_response().id.partition("_")[0]].append(result.as_numpy("OUTPUT")[0][0])
    for sequence_id, (first, sign) in zip(ids, SEQUENCES, strict=True):
        wanted = expected(sequence(first, sign), int(sequence_id) if dyna else 0)
        assert found[str(sequence_id)] == wanted


async def test_simple_grpc_aio_sequence_stream_infer_client(address):
    async def requests():
        for sequence_id, (first, sign) in zip((3000, 3001), SEQUENCES, strict=False):
            values = sequence(first, sign)
            for place, value in enumerate(values):
                yield {
                    "model_name": "simple_sequence",
                    "inputs": step(value),
                    "request_id": f"{sequence_id}_{place}",
                    "sequence_id": sequence_id,
                    "sequence_start": place == 0,
                    "sequence_end": place == len(values) - 1,
                }

    found = []
    async with triton_aio.InferenceServerClient(address) as client:
        async for result, error in client.stream_infer(requests()):
            assert error is None
            found.append(result.as_numpy("OUTPUT")[0][0])
    assert found == [*expected(sequence(*SEQUENCES[0])), *expected(sequence(*SEQUENCES[1]))]


def test_simple_grpc_model_control(client):
    assert {model.name for model in client.get_model_repository_index().models} == {*triton_models.CONFIGS}
    client.load_model("simple")
    assert client.is_model_ready("simple")
    with pytest.raises(InferenceServerException, match="failed to load"):
        client.load_model("simple", config='"parameters": {"config": {{"max_batch_size": "16"}}}')
    client.load_model("simple", config='{"max_batch_size":"16"}')
    assert client.get_model_config("simple").config.max_batch_size == 16
    client.unload_model("simple")
    assert not client.is_model_ready("simple")
    # INTERNAL there, with "failed to poll from model repository".
    with pytest.raises(InferenceServerException, match="should be <version>/<name>") as caught:
        client.load_model("simple", config="{}", files={"file:" + "A" * 256: b"a"})
    assert "INVALID_ARGUMENT" in caught.value.status()
    assert client.is_server_live()
    with pytest.raises(InferenceServerException, match="failed to load"):
        client.load_model("wrong_model_name")
    client.load_model("simple")
    assert client.is_model_ready("simple")
    assert client.get_model_config("simple").config.max_batch_size == 8


def image_model(client, name):
    """As parse_model of image_client.py: (input, its shape, output, max_batch_size)."""
    metadata, config = client.get_model_metadata(name), client.get_model_config(name).config
    assert (len(metadata.inputs), len(metadata.outputs), len(config.input)) == (1, 1, 1)
    assert metadata.outputs[0].datatype == "FP32"
    assert sum(size > 1 for size in metadata.outputs[0].shape) == 1
    assert len(metadata.inputs[0].shape) == 3
    channels = {triton_config.ModelInput.FORMAT_NCHW: 0, triton_config.ModelInput.FORMAT_NHWC: 2}
    assert metadata.inputs[0].shape[channels[config.input[0].format]] == 3
    return metadata.inputs[0].name, list(metadata.inputs[0].shape), metadata.outputs[0].name, config.max_batch_size


def assert_classes(result, output, count):
    """As postprocess of image_client.py: the value, the index and the label of each class, the highest first."""
    classes = [text.decode().split(":") for text in result.as_numpy(output)]
    assert [label for _, _, label in classes] == [triton_models.label(int(index)) for _, index, _ in classes]
    values = [float(value) for value, _, _ in classes]
    assert (len(values), values) == (count, sorted(values, reverse=True))


@pytest.mark.parametrize("name", ["densenet_onnx", "inception_onnx"])
@pytest.mark.parametrize("way", ["sync", "async", "streaming"])
def test_image_client(client, name, way):
    input_name, shape, output_name, max_batch_size = image_model(client, name)
    assert max_batch_size == 0
    tensor = triton.InferInput(input_name, shape, "FP32")
    tensor.set_data_from_numpy(np.random.default_rng(0).random(shape, np.float32))
    outputs = [triton.InferRequestedOutput(output_name, class_count=3)]
    answers: queue.Queue = queue.Queue()

    def answer(result, error):
        answers.put((result, error))

    if way == "sync":
        answer(client.infer(name, [tensor], request_id="1", outputs=outputs), None)
    elif way == "async":
        client.async_infer(name, [tensor], answer, request_id="1", outputs=outputs)
    else:
        client.start_stream(answer)
        client.async_stream_infer(name, [tensor], request_id="1", outputs=outputs)
    result, error = answers.get(timeout=60)
    assert error is None
    assert result.get_response().id == "1"
    assert_classes(result, output_name, 3)


def test_ensemble_image_client(client):
    config = client.get_model_config("image_ensemble").config
    tensor = triton.InferInput("IMAGE", list(config.input[0].dims), "FP32")
    tensor.set_data_from_numpy(np.random.default_rng(0).random((3, 224, 224), np.float32))
    outputs = [triton.InferRequestedOutput("CLASSES", class_count=3)]
    assert_classes(client.infer("image_ensemble", [tensor], outputs=outputs), "CLASSES", 3)


def test_grpc_image_client(stub):
    request = service_pb2.ModelInferRequest(model_name="densenet_onnx")
    request.inputs.add(name="data_0", datatype="FP32", shape=[3, 224, 224])
    request.outputs.add(name="fc6_1").parameters["classification"].int64_param = 2
    request.raw_input_contents.append(np.ones((3, 224, 224), np.float32).tobytes())
    for response in (stub.ModelInfer(request), *(r.infer_response for r in stub.ModelStreamInfer(iter([request])))):
        (raw,) = response.raw_output_contents
        contents = np.reshape(utils.deserialize_bytes_tensor(raw), list(response.outputs[0].shape))
        assert [len(result.decode().split(":")) for result in contents] == [3, 3]


def test_grpc_client(stub):
    assert stub.ServerLive(service_pb2.ServerLiveRequest()).live
    assert stub.ServerReady(service_pb2.ServerReadyRequest()).ready
    assert stub.ModelReady(service_pb2.ModelReadyRequest(name="densenet_onnx", version="")).ready
    assert "classification" in stub.ServerMetadata(service_pb2.ServerMetadataRequest()).extensions
    assert stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="densenet_onnx")).platform == "onnxruntime_onnx"
    assert stub.ModelConfig(service_pb2.ModelConfigRequest(name="densenet_onnx")).config.input[0].format
    request = service_pb2.ModelInferRequest(model_name="densenet_onnx", id="my request id")
    request.inputs.add(name="data_0", datatype="FP32", shape=[3, 224, 224])
    request.outputs.add(name="fc6_1")
    request.raw_input_contents.append(b"a" * 602112)
    response = stub.ModelInfer(request)
    assert (response.id, list(response.outputs[0].shape)) == ("my request id", [1000])


LONG = "m" * 300


@pytest.mark.parametrize(
    ("method", "request_type", "fields"),
    [
        ("ModelReady", service_pb2.ModelReadyRequest, {"name": LONG, "version": "1"}),
        ("ModelMetadata", service_pb2.ModelMetadataRequest, {"name": LONG}),
        ("ModelConfig", service_pb2.ModelConfigRequest, {"name": LONG}),
        ("ModelStatistics", service_pb2.ModelStatisticsRequest, {"name": LONG}),
        ("ModelInfer", service_pb2.ModelInferRequest, {"model_name": LONG}),
        ("TraceSetting", service_pb2.TraceSettingRequest, {"model_name": LONG}),
        ("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest, {"model_name": LONG}),
        ("RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest, {"model_name": LONG}),
        ("SystemSharedMemoryRegister", service_pb2.SystemSharedMemoryRegisterRequest, {"name": LONG, "key": LONG}),
    ],
)
def test_a_name_of_300_characters_is_an_error_of_the_caller(stub, method, request_type, fields):
    if method == "ModelReady":
        assert not stub.ModelReady(request_type(**fields)).ready
        return
    with pytest.raises(grpc.RpcError) as caught:
        getattr(stub, method)(request_type(**fields))
    assert caught.value.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)


@pytest.mark.parametrize("method", ["ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"])
def test_a_version_that_is_no_number_is_an_error_of_the_caller(stub, method):
    request = getattr(service_pb2, f"{method}Request")(name="simple", version="abc")
    with pytest.raises(grpc.RpcError, match="model_version is 'abc'") as caught:
        getattr(stub, method)(request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
