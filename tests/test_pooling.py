"""Poolings: each against the backbone's hidden states, without influence of padding, saved and loaded, and trained."""

import shutil

import pytest
import torch
from conftest import TINY_MODEL, make_documents, write_bert
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from transformers import AlbertConfig, AlbertModel, AutoModel, AutoTokenizer

from condenser.evaluation.encoders import describe, load_encoder, reinitialised
from condenser.evaluation.pooling import with_pooling

TEXTS = ["dense", "Search encodes tokens and ranks documents.", "masked heads attend to layers, again and again"]
NAMES = ["cls", "mean", "max", "mean+max", "last1-cls", "last2-cls", "weighted-layers", "attention"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"), [*make_documents(40), *TEXTS], **TINY_MODEL)


@pytest.fixture(scope="module")
def padded_on_the_left(bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("left")
    shutil.copytree(bert, folder, dirs_exist_ok=True)
    AutoTokenizer.from_pretrained(bert, padding_side="left").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def albert(bert, tmp_path_factory):
    """Whose layers come in pairs."""
    folder, tokenizer = tmp_path_factory.mktemp("albert"), AutoTokenizer.from_pretrained(bert)
    tokenizer.save_pretrained(folder)
    sizes = TINY_MODEL | {"num_hidden_layers": 2, "inner_group_num": 2, "embedding_size": 16}
    AlbertModel(AlbertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(params=["bert", "roberta", "padded_on_the_left", "albert"])
def model_folder(request):
    return str(request.getfixturevalue(request.param))


def expected(folder, text, name):
    """Of one text, by transformers alone."""
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.inference_mode():
        layers = AutoModel.from_pretrained(folder)(**inputs, output_hidden_states=True).hidden_states
    last = layers[-1][0]  # [L, H]
    cls = torch.stack([layer[0, 0] for layer in layers[1:]])  # [layers, H], without the embeddings'
    return {
        "cls": last[0],
        "mean": last.mean(0),
        "max": last.max(0).values,
        "mean+max": torch.cat([last.max(0).values, last.mean(0)]),
        "last1-cls": cls[-1],
        "last2-cls": cls[-2:].mean(0),
        "weighted-layers": cls.mean(0),  # before fine-tuning
        "attention": last.mean(0),  # too
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_poolings_follow_the_hidden_states_alone_and_in_a_batch(model_folder, name):
    encoder = with_pooling(load_encoder(model_folder, None), name)
    reference = torch.stack([expected(model_folder, text, name) for text in TEXTS])
    batch = encoder.encode(TEXTS, convert_to_tensor=True)
    alone = torch.cat([encoder.encode([text], convert_to_tensor=True) for text in TEXTS])
    torch.testing.assert_close(batch, reference, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, reference, atol=1e-5, rtol=1e-5)
    assert encoder.get_embedding_dimension() == reference.shape[1]


def test_attention_weighs_tokens_by_their_product_with_its_vector(bert):
    encoder = with_pooling(load_encoder(str(bert), None), "attention")
    encoder[1].attention_query.data = torch.linspace(-9, 9, TINY_MODEL["hidden_size"])
    for text, vector in zip(TEXTS, encoder.encode(TEXTS, convert_to_tensor=True), strict=True):
        inputs = AutoTokenizer.from_pretrained(bert)(text, return_tensors="pt")
        last = AutoModel.from_pretrained(bert)(**inputs).last_hidden_state[0]
        weights = (last @ encoder[1].attention_query / len(last[0]) ** 0.5).softmax(0)
        torch.testing.assert_close(vector, weights @ last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "attention"])
def test_sentence_transformers_loads_what_was_saved(bert, name, tmp_path):
    encoder = with_pooling(load_encoder(str(bert), None), name)
    if name == "weighted-layers":
        encoder[1].layer_weights.data = torch.tensor([1.0, 3.0, 0.5])
    encoder.save(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path))
    torch.testing.assert_close(
        loaded.encode(TEXTS, convert_to_tensor=True), encoder.encode(TEXTS, convert_to_tensor=True), atol=0, rtol=0
    )
    assert "condenser" not in (tmp_path / "modules.json").read_text()


def test_a_copy_keeps_settings_and_normalisation_and_leaves_the_encoder_as_it_was(bert):
    encoder = load_encoder(str(bert), 12)
    encoder.similarity_fn_name, encoder.prompts = "dot", {"query": "q: "}
    encoder.append(Normalize())
    before = describe(encoder)
    twin = with_pooling(with_pooling(encoder, "weighted-layers"), "mean")
    assert describe(encoder) == before
    assert describe(twin) == before | {"pooling": "mean", "config": describe(twin)["config"]}
    assert not twin.transformers_model.config.output_hidden_states
    assert torch.linalg.norm(twin.encode(TEXTS[1], convert_to_tensor=True)).item() == pytest.approx(1, abs=1e-5)


def test_the_weights_of_layers_are_trained_and_those_of_the_last_layers_are_not(bert):
    gradients = {}
    for name in ("weighted-layers", "last2-cls", "attention"):
        encoder = with_pooling(load_encoder(str(bert), None), name)
        encoder(encoder.tokenize(TEXTS))["sentence_embedding"].square().sum().backward()
        (own,) = encoder[1].parameters()
        gradients[name] = own.grad
        assert any(p.grad is not None and p.grad.any() for p in encoder.transformers_model.parameters())
    assert len(gradients["weighted-layers"]) == TINY_MODEL["num_hidden_layers"]
    assert gradients["weighted-layers"].all()
    assert gradients["last2-cls"] is None
    assert gradients["attention"].any()


def test_an_untrained_twin_keeps_the_pooling(bert):
    encoder = with_pooling(load_encoder(str(bert), None), "last2-cls")
    twin = reinitialised(encoder, 0)
    assert twin.encode(TEXTS).shape == (3, TINY_MODEL["hidden_size"])
    assert describe(twin)["modules"] == ["Transformer", "WeightedLayerPooling", "Pooling"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("median", r"no pooling 'median': there are cls, mean, max, mean\+max, last<k>-cls, weighted-layers"),
        ("last0-cls", "no pooling 'last0-cls'"),
        ("last4-cls", "'last4-cls': the encoder has 3 layers"),
    ],
)
def test_unknown_poolings_are_refused(bert, name, message):
    with pytest.raises(ValueError, match=message):
        with_pooling(load_encoder(str(bert), None), name)


def test_an_encoder_with_a_trained_projection_is_refused(bert):
    encoder = load_encoder(str(bert), None)
    encoder.append(Dense(32, 16))
    with pytest.raises(ValueError, match="not of Transformer, Pooling, Dense"):
        with_pooling(encoder, "mean")
