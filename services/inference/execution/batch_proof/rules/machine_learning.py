"""Operators of ai.onnx.ml on a table that has a row of features for each row of the batch."""

from __future__ import annotations

from collections.abc import Sequence

from services.inference.execution.batch_proof.abstract_value import Tensor
from services.inference.execution.batch_proof.operator_call import NotProvenError, OperatorCall
from services.inference.execution.batch_proof.registry import MICROSOFT, ML, ONNX, Outcome, rule
from services.inference.execution.batch_proof.sizes import Size


def _table(call: OperatorCall) -> Tensor:
    """The first input. Raises NotProvenError if it is not a table. With one axis, the rows would be features."""
    table = call.input(0)
    if len(call.shape(0)) != 2 or (table.rows is not None and table.rows.axis != 0):
        raise NotProvenError("it takes the rows for features, as its input is no table with rows along axis 0")
    return table


@rule("Scaler", "Normalizer", "Imputer", domain=ML)
def by_feature(call: OperatorCall) -> Outcome:
    """Scales or fills in features, or divides a row by its norm."""
    table = _table(call)
    return Tensor(table.shape, table.rows)


@rule("TreeEnsemble", "TreeEnsembleRegressor", "LinearRegressor", "SVMRegressor", domain=ML)
def regressor(call: OperatorCall) -> Outcome:
    """A row of targets for each row."""
    table = _table(call)
    name = "targets" if call.operator == "LinearRegressor" else "n_targets"
    return Tensor((call.shape(0)[0], Size(int(call.attribute(name, 1)))), table.rows)


@rule("TreeEnsembleClassifier", "LinearClassifier", "SVMClassifier", domain=ML)
def classifier(call: OperatorCall) -> Outcome:
    """A label and a row of scores for each row."""
    table = _table(call)
    size = call.shape(0)[0]
    labels = _labels(call)
    # With two classes there may be one score. A support vector machine may have one score for each pair of classes.
    width = Size(len(labels)) if len(labels) > 2 and call.operator != "SVMClassifier" else call.fresh()
    return (Tensor((size,), table.rows), Tensor((size, width), table.rows))


def _labels(call: OperatorCall) -> Sequence[object]:
    names = ("classlabels_int64s", "classlabels_ints", "classlabels_strings")
    return next((labels for name in names if (labels := call.attribute(name))), ())


@rule("OneHotEncoder", domain=ML)
def one_hot_encoder(call: OperatorCall) -> Outcome:
    """Appends an axis of categories."""
    categories = call.attribute("cats_int64s") or call.attribute("cats_strings") or ()
    return Tensor((*call.shape(0), Size(len(categories))), call.input(0).rows)


@rule("FeatureVectorizer", domain=ML)
def feature_vectorizer(call: OperatorCall) -> Outcome:
    """Concatenates the features of several tables."""
    _table(call)
    for place, tensor in enumerate(call.given):
        if len(call.shape(place)) != 2 or tensor.rows != call.input(0).rows:
            raise NotProvenError("its inputs do not have their rows along axis 0")
    return Tensor((call.shape(0)[0], call.fresh()), call.input(0).rows)


@rule("TfIdfVectorizer", domain=ONNX)
def tf_idf_vectorizer(call: OperatorCall) -> Outcome:
    """Counts sequences in each row of a table. With one axis it would count across rows."""
    table = _table(call)
    return Tensor((call.shape(0)[0], call.fresh()), table.rows)


@rule("ZipMap", "DictVectorizer", "CastMap", domain=ML)
def maps(call: OperatorCall) -> Outcome:
    """Maps are not tensors."""
    raise NotProvenError("it makes or takes maps, which are no tensors")


@rule("Tokenizer", domain=MICROSOFT)
def tokenizer(call: OperatorCall) -> Outcome:
    """Its result is as wide as the row with the most tokens."""
    raise NotProvenError("it pads all rows to the longest")
