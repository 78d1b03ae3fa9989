"""Operators of ai.onnx.ml on a table that has a row of features for each row of the batch."""

from __future__ import annotations

from services.inference.execution.batch_proof.abstract_value import Tensor
from services.inference.execution.batch_proof.operator_call import NotProvenError, OperatorCall
from services.inference.execution.batch_proof.registry import Outcome, rule
from services.inference.execution.batch_proof.sizes import Size


def _table(call: OperatorCall, *widths: Size) -> Tensor:
    """A table of this width with the rows of input 0. Raises NotProvenError if that is no table: with one axis, the
    rows would be features."""
    if call.rank != 2 or (call.rows is not None and call.rows.axis != 0):
        raise NotProvenError("it takes the rows for features, as its input is no table with rows along axis 0")
    return Tensor((call.shape(0)[0], *widths), call.rows)


@rule("ai.onnx.ml.Scaler", "ai.onnx.ml.Normalizer", "ai.onnx.ml.Imputer")
def by_feature(call: OperatorCall) -> Outcome:
    return _table(call, *call.shape(0)[1:])


@rule("ai.onnx.ml.TreeEnsemble", "ai.onnx.ml.TreeEnsembleRegressor")
@rule("ai.onnx.ml.LinearRegressor", "ai.onnx.ml.SVMRegressor")
def regressor(call: OperatorCall) -> Outcome:
    name = "targets" if call.operator == "LinearRegressor" else "n_targets"
    return _table(call, Size(int(call.attribute(name, 1))))


@rule("ai.onnx.ml.TreeEnsembleClassifier", "ai.onnx.ml.LinearClassifier", "ai.onnx.ml.SVMClassifier")
def classifier(call: OperatorCall) -> Outcome:
    """A label and a row of scores for each row."""
    names = ("classlabels_int64s", "classlabels_ints", "classlabels_strings")
    labels = next((labels for name in names if (labels := call.attribute(name))), ())
    # With two classes there may be one score. A support vector machine may have one score for each pair of classes.
    width = Size(len(labels)) if len(labels) > 2 and call.operator != "SVMClassifier" else call.fresh()
    return (_table(call), _table(call, width))


@rule("ai.onnx.ml.OneHotEncoder")
def one_hot_encoder(call: OperatorCall) -> Outcome:
    categories = call.attribute("cats_int64s") or call.attribute("cats_strings") or ()
    return Tensor((*call.shape(0), Size(len(categories))), call.rows)


@rule("ai.onnx.ml.FeatureVectorizer")
def feature_vectorizer(call: OperatorCall) -> Outcome:
    made = _table(call, call.fresh())
    for index, tensor in enumerate(call.given):
        if len(call.shape(index)) != 2 or tensor.rows != call.rows:
            raise NotProvenError("its inputs do not have their rows along axis 0")
    return made


@rule("TfIdfVectorizer")
def tf_idf_vectorizer(call: OperatorCall) -> Outcome:
    """Counts sequences in each row of a table. With one axis it would count across rows."""
    return _table(call, call.fresh())


@rule("ai.onnx.ml.ZipMap", "ai.onnx.ml.DictVectorizer", "ai.onnx.ml.CastMap")
def maps(call: OperatorCall) -> Outcome:
    raise NotProvenError("it makes or takes maps, which are no tensors")
