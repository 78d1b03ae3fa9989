"""The drawing of an ensemble."""

import re

from google.protobuf import text_format
from ringmesh.oip.v2 import model_config_pb2

from services.console.pages import ensemble_graph


def config(*steps, inputs=("in",), outputs=("out",)):
    """An ensemble of steps (model, tensors read, tensors written)."""
    made = model_config_pb2.ModelConfig()
    for name in inputs:
        made.input.add(name=name)
    for name in outputs:
        made.output.add(name=name)
    for model, reads, writes in steps:
        step = made.ensemble_scheduling.step.add(model_name=model)
        step.input_map.update({f"i{index}": name for index, name in enumerate(reads)})
        step.output_map.update({f"o{index}": name for index, name in enumerate(writes)})
    return made


def boxes(svg):
    """The left edge of each box by its label."""
    return {label: float(x) for label, x in re.findall(r'<title>(.*?)</title><rect x="([\d.]+)"', svg)}


def test_steps_stand_right_of_what_they_read_whatever_their_order_in_the_file():
    svg = ensemble_graph.draw(config(("last", ["between", "in"], ["out"]), ("first", ["in"], ["between"])))
    found = boxes(svg)
    assert found["in"] < found["first"] < found["last"] < found["out"]
    assert svg.count("<path") == 4
    assert 'href="/models/first"' in svg


def test_names_are_escaped_and_long_ones_are_cut():
    svg = ensemble_graph.draw(config(("<b>" + "x" * 40, ["in"], ["out"])))
    assert "<b>" not in svg
    assert "&lt;b&gt;xxxxxxxxxxxxxx…</text>" in svg


def test_a_cycle_is_drawn_and_ends():
    assert boxes(ensemble_graph.draw(config(("a", ["y"], ["x"]), ("b", ["x"], ["y", "out"]))))


def test_a_model_without_steps_has_no_graph():
    assert ensemble_graph.draw(text_format.Parse('name: "mlp"', model_config_pb2.ModelConfig())) == ""
