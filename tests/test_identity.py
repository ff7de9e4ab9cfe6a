"""Identity: every field that changes the KV is seen and named, and nothing else is."""

import ctypes
import dataclasses
import gc
import json
import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from kvkern import identity as module
from kvkern.errors import IdentityError, RequestError, UnsupportedError
from kvkern.identity import (
    Identity,
    WeightsDigest,
    compare,
    match,
    model_geometry,
    rope_fields,
    tokenizer_digest,
    tokens_digest,
    weights_digest,
)

WORDS = ["the", "handbook", "says", "that", "a", "pump", "starts", "when", "its", "valve", "is", "open"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def tiny_model(*, dtype=torch.float32, seed=0, **config):
    """A random Qwen3; the same seed is the same weights in any process."""
    shape = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**{**shape, **config})).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and "norm" not in name:
            tensor.normal_()
    return model.to(dtype)


def tiny_tokenizer(*, words=WORDS, template=TEMPLATE, normalizer=None):
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[PAD]", *dict.fromkeys(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.normalizer = normalizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.chat_template = template
    return tokenizer


IDS = torch.arange(2, 14)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def made(model, tokenizer, **options):
    options = {"template": TEMPLATE, "template_kwargs": {"thinking": False}, **options}
    return Identity.of(model, tokenizer, IDS, **options)


# -- what is in it, and refused by name --------------------------------------------------------------------------------


def test_the_model_that_made_it_is_accepted(model, tokenizer):
    found = made(model, tokenizer)
    match(found, model, tokenizer, where="a.kv")
    compare(found, Identity.expect(model, tokenizer, found), where="a.kv")


def one_ulp(model):
    weight = model.model.layers[1].self_attn.v_proj.weight
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(torch.inf))
    return model


def rounded_frequencies(model):
    # The weights are bf16 either way; .to() rounds the RoPE frequencies as well.
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.bfloat16()
    return model


DEFAULT = {"rope_type": "default", "rope_theta": 1000000.0}
YARN = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 2.0}

OTHER_MODELS = {
    "geometry.layers": lambda: tiny_model(num_hidden_layers=3),
    "geometry.num_kv_heads": lambda: tiny_model(num_key_value_heads=1),
    "geometry.num_qo_heads": lambda: tiny_model(num_attention_heads=8),
    "geometry.head_dim": lambda: tiny_model(head_dim=32),
    "geometry.dtype": lambda: tiny_model(dtype=torch.bfloat16),
    "architecture.rms_norm_eps": lambda: tiny_model(rms_norm_eps=1e-5),
    "architecture.hidden_act": lambda: tiny_model(hidden_act="gelu"),
    "architecture.intermediate_size": lambda: tiny_model(intermediate_size=32),
    "rope.theta": lambda: tiny_model(rope_parameters={**DEFAULT, "rope_theta": 5000000.0}),
    "rope.partial": lambda: tiny_model(rope_parameters={**DEFAULT, "partial_rotary_factor": 0.5}),
    "rope.factor": lambda: tiny_model(rope_parameters=YARN),
    "rope.dtype": lambda: rounded_frequencies(tiny_model()),
    "weights": lambda: one_ulp(tiny_model()),
}


@pytest.mark.parametrize("field", OTHER_MODELS)
def test_another_model_is_refused_with_the_field_named(model, tokenizer, field):
    found = made(model, tokenizer)
    with pytest.raises(IdentityError) as caught:
        match(found, OTHER_MODELS[field](), tokenizer, where="a.kv")
    assert caught.value.field == field
    assert caught.value.found.endswith(" in a.kv") and caught.value.needed.endswith("as in the model")


def added(tokenizer):
    tokenizer.add_tokens([AddedToken("<tool>", special=True)])
    return tokenizer


def with_post_processor():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "[PAD] $A", special_tokens=[("[PAD]", 1)]
    )
    return tokenizer


def without_pre_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


OTHER_TOKENIZERS = {
    "added token": lambda: added(tiny_tokenizer()),
    "vocabulary": lambda: tiny_tokenizer(words=[*WORDS, "word"]),
    "order": lambda: tiny_tokenizer(words=WORDS[::-1]),
    "normaliser": lambda: tiny_tokenizer(normalizer=normalizers.Lowercase()),
    "pre-tokeniser": without_pre_tokenizer,
    "post-processor": with_post_processor,
}


@pytest.mark.parametrize("change", OTHER_TOKENIZERS)
def test_another_tokenizer_is_refused(model, tokenizer, change):
    with pytest.raises(IdentityError) as caught:
        match(made(model, tokenizer), model, OTHER_TOKENIZERS[change](), where="a.kv")
    assert caught.value.field == "tokenizer" and "with, or publish" in caught.value.do


def test_another_template_is_refused(model, tokenizer):
    found = made(model, tokenizer)
    for other in (TEMPLATE + "\n", None):
        with pytest.raises(IdentityError) as caught:
            match(found, model, tiny_tokenizer(template=other), where="a.kv")
        assert caught.value.field == "template"


@pytest.mark.parametrize("kwargs", [{"thinking": True}, {}, {"thinking": False, "date": "today"}])
def test_another_template_keyword_is_refused(model, tokenizer, kwargs):
    with pytest.raises(IdentityError) as caught:
        match(made(model, tokenizer), model, tokenizer, template_kwargs=kwargs, where="a.kv")
    assert caught.value.field == ("template_kwargs.date" if "date" in kwargs else "template_kwargs.thinking")


def test_a_plain_text_needs_no_template(model, tokenizer):
    found = Identity.of(model, tokenizer, IDS)
    assert found.template is None
    match(found, model, tiny_tokenizer(template="another"), where="a.kv")


def test_token_ids_need_no_tokenizer(model, tokenizer):
    found = Identity.of(model, None, IDS)
    match(found, model, None, where="a.kv")
    with pytest.raises(IdentityError, match=r"tokenizer: found none in a\.kv"):
        match(found, model, tokenizer, where="a.kv")


def test_a_child_knows_its_path(model, tokenizer):
    def below(ids, end=12):
        return SimpleNamespace(identity=Identity.of(model, tokenizer, ids), end=end)

    parent = below(IDS)
    found = made(model, tokenizer, parent=parent)
    assert (found.position, found.ancestors) == (12, parent.identity.digest())
    match(found, model, tokenizer, parent=below(IDS), where="a.kv")
    for other, field in ((below(IDS, end=13), "position"), (below(IDS.flip(0)), "ancestors"), (None, "position")):
        with pytest.raises(IdentityError) as caught:
            match(found, model, tokenizer, parent=other, where="a.kv")
        assert caught.value.field == field
    with pytest.raises(RequestError, match=r"parent\.identity"):
        made(model, tokenizer, parent=SimpleNamespace(identity=None, end=12))


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Identity)])
def test_compare_sees_every_field(model, tokenizer, field):
    needed = made(model, tokenizer)
    value = getattr(needed, field)
    if isinstance(value, int):
        other = value + 1
    elif isinstance(value, dict):
        other = {**value, "new": 1}
    elif field == "geometry":
        other = dataclasses.replace(value, layers=9)
    else:
        other = "0" * 64
    with pytest.raises(IdentityError) as caught:
        compare(dataclasses.replace(needed, **{field: other}), needed, where="a.kv")
    assert caught.value.field.split(".")[0] == field


def test_the_message_says_field_found_needed_and_what_to_do(model, tokenizer):
    other = tiny_model(rope_parameters={**DEFAULT, "rope_theta": 5000000})
    with pytest.raises(IdentityError) as caught:
        match(made(model, tokenizer), other, tokenizer, where="handbook.kv")
    assert str(caught.value) == (
        "rope.theta: found 1000000.0 in handbook.kv, needed 5000000.0 as in the model\n"
        "  do: publish the document again with this model"
    )


def test_digests_are_shortened(model, tokenizer):
    found = made(model, tokenizer)
    with pytest.raises(IdentityError) as caught:
        match(found, OTHER_MODELS["weights"](), tokenizer, where="a.kv")
    assert caught.value.found == f"{found.weights[:4]}..{found.weights[-4:]} in a.kv"


@pytest.mark.parametrize("field", ["rope.theta", "geometry.layers"])
def test_weights_are_not_hashed_where_something_cheaper_differs(model, tokenizer, field, monkeypatch):
    found = made(model, tokenizer)
    hashed = []
    monkeypatch.setattr(module, "weights_digest", lambda model, **_: hashed.append(model) or "0" * 64)
    with pytest.raises(IdentityError, match=field):
        match(found, OTHER_MODELS[field](), tokenizer, where="a.kv")
    assert not hashed
    with pytest.raises(IdentityError, match="weights"):
        match(found, model, tokenizer, where="a.kv")
    assert hashed


# -- what is not in it -------------------------------------------------------------------------------------------------


def test_padding_and_truncation_of_a_tokenizer_do_not_count(model, tokenizer):
    found, before = made(model, tokenizer), tokenizer.backend_tokenizer.to_str()
    tokenizer(["the pump", "the"], padding=True)
    tokenizer("the pump starts", truncation=True, max_length=2)
    tokenizer.padding_side = "left"
    assert tokenizer.backend_tokenizer.to_str() != before  # the calls did leave a trace
    match(found, model, tokenizer, where="a.kv")


def test_what_only_decoding_reads_does_not_count(tokenizer):
    before = tokenizer_digest(tokenizer)
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    assert tokenizer_digest(tokenizer) == before


def test_an_edit_after_a_digest_is_seen_by_the_next(tokenizer):
    """Digests are kept by the tokenizer's whole text, and not by the tokenizer."""
    before = tokenizer_digest(tokenizer)
    tokenizer.add_tokens(["pumps"])
    after = tokenizer_digest(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert len({before, after, tokenizer_digest(tokenizer)}) == 3


def test_paths_versions_and_caches_do_not_count(tokenizer):
    model = tiny_model()
    found = made(model, tokenizer)
    model.config._name_or_path = "elsewhere"
    model.config.transformers_version = "9.9"
    model.config.use_cache = False
    match(found, model, tokenizer, where="a.kv")


# -- config ------------------------------------------------------------------------------------------------------------


def test_old_and_new_spellings_of_rope_are_one():
    old = SimpleNamespace(rope_theta=500000, rope_scaling={"type": "linear", "factor": 2})
    new = SimpleNamespace(rope_parameters={"rope_type": "linear", "type": "linear", "factor": 2.0, "rope_theta": 5e5})
    assert rope_fields(old) == rope_fields(new) == {"type": "linear", "partial": 1.0, "factor": 2.0, "theta": 500000.0}
    assert rope_fields(SimpleNamespace(rope_theta=1e4)) == {"type": "default", "partial": 1.0, "theta": 10000.0}


def test_rope_of_several_kinds_of_layers_is_told_apart():
    parameters = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "other": {"rope_theta": 1e4}}
    found = rope_fields(SimpleNamespace(rope_parameters=parameters))
    assert found["full_attention.theta"] == 1e6 and found["other.theta"] == 1e4


def test_every_parameter_of_a_scaling_counts():
    def given(**more):
        return rope_fields(SimpleNamespace(rope_parameters={**YARN, **more}))

    assert given() == given(attention_factor=None)
    seen = [given(), given(beta_fast=16), given(attention_factor=1), given(long_factor=[1, 2]), given(truncate=False)]
    assert len({json.dumps(fields, sort_keys=True) for fields in seen}) == len(seen)


def test_geometry_takes_dtype_from_the_weights_and_head_dim_from_the_heads():
    model = tiny_model(dtype=torch.bfloat16)
    model.config.dtype = torch.float32
    assert model_geometry(model).dtype == torch.bfloat16
    config = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, hidden_size=64)
    bare = SimpleNamespace(config=config, named_parameters=lambda: [], dtype=torch.float16)
    geometry = model_geometry(bare)
    assert (geometry.num_kv_heads, geometry.head_dim, geometry.dtype) == (4, 16, torch.float16)


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_json_is_canonical_and_comes_back(model, tokenizer):
    found = made(model, tokenizer)
    text = found.to_json()
    assert Identity.from_json(text) == found and Identity.from_json(text).to_json() == text
    assert " " not in text and list(json.loads(text)) == sorted(json.loads(text))
    turned = json.dumps(dict(reversed(json.loads(text).items())), indent=2)
    assert Identity.from_json(turned).digest() == found.digest()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weights": None}, "weights"),
        ({"tokens": "12"}, "tokens"),
        ({"position": True}, "position"),
        ({"more": 1}, "more"),
        ({"geometry": {}}, "geometry"),
        ({"dtype": "float99"}, "geometry.dtype"),
        ({"head_dim": 17}, "geometry.head_dim"),
        ({"layers": "two"}, "geometry.layers"),
    ],
)
def test_json_of_another_kind_is_refused_by_name(model, tokenizer, change, field):
    plain = made(model, tokenizer).to_dict()
    for name, value in change.items():
        (plain["geometry"] if name in plain["geometry"] else plain)[name] = value
    with pytest.raises(IdentityError) as caught:
        Identity.from_json(json.dumps(plain))
    assert caught.value.field == field


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000])
def test_no_json_object_is_refused(text):
    with pytest.raises(IdentityError, match="identity: found no JSON object"):
        Identity.from_json(text)


def test_a_missing_field_is_refused_by_name(model, tokenizer):
    plain = made(model, tokenizer).to_dict()
    for name in plain:
        with pytest.raises(IdentityError) as caught:
            Identity.from_dict({key: value for key, value in plain.items() if key != name})
        assert caught.value.field == name


def test_a_template_keyword_that_no_file_can_keep_is_refused(model, tokenizer):
    for value in (object(), float("nan"), {1, 2}):
        with pytest.raises(RequestError) as caught:
            made(model, tokenizer, template_kwargs={"tools": value})
        assert caught.value.field == "template_kwargs.tools"
    assert made(model, tokenizer, template_kwargs={"tools": (1, 2)}).template_kwargs == {"tools": [1, 2]}


def test_tokens_are_the_same_from_a_list_or_any_integer_tensor():
    assert tokens_digest(IDS) == tokens_digest(IDS.tolist()) == tokens_digest(IDS.int())
    assert tokens_digest(IDS) != tokens_digest(IDS.flip(0))


def test_a_tokenizer_without_a_backend_is_refused(model):
    with pytest.raises(UnsupportedError, match="tokenizer: found SimpleNamespace"):
        tokenizer_digest(SimpleNamespace())


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch):
    """Tensors that were read whole."""
    seen = []
    whole = module._tensor_digest
    monkeypatch.setattr(module, "_tensor_digest", lambda tensor: seen.append(tensor.shape) or whole(tensor))
    return seen


def test_weights_are_hashed_once_a_model(hashed):
    digest, model = WeightsDigest(), tiny_model()
    first = digest(model)
    once = len(hashed)
    assert digest(model) == first and len(hashed) == once == len(model.state_dict())


def edit_in_place(model):
    with torch.no_grad():
        model.lm_head.weight[1, 1] += 1


def edit_past_the_version_counter(model):
    version = model.lm_head.weight._version
    model.lm_head.weight.data.mul_(2)
    assert model.lm_head.weight._version == version


def edit_by_assigning_data(model):
    model.lm_head.weight.data = model.lm_head.weight.data + 1


def edit_by_another_parameter(model):
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))


def edit_where_the_old_one_lay(model):
    shape = model.lm_head.weight.shape
    del model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(torch.randn(shape))


def edit_by_training(model):
    model(input_ids=IDS[None]).logits.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def edit_by_loading(model):
    model.load_state_dict(tiny_model(seed=1).state_dict())


EDITS = [
    edit_in_place,
    edit_past_the_version_counter,
    edit_by_assigning_data,
    edit_by_another_parameter,
    edit_where_the_old_one_lay,
    edit_by_training,
    edit_by_loading,
]


@pytest.mark.parametrize("edit", EDITS)
def test_weights_are_hashed_again_after_an_edit(edit):
    digest, model = WeightsDigest(), tiny_model()
    before = digest(model)
    edit(model)
    after = digest(model)
    assert after != before and after == WeightsDigest()(model)


def test_an_edit_of_any_one_element_in_place_is_seen():
    digest, model = WeightsDigest(), tiny_model()
    seen = {digest(model)}
    for tensor in model.state_dict(keep_vars=True).values():
        with torch.no_grad():
            tensor.view(-1)[random.randrange(tensor.numel())] += 1
        seen.add(digest(model))
    assert len(seen) == 1 + len(model.state_dict())


def by_data(tensor, i):
    tensor.data.view(-1)[i] += 1


def by_numpy(tensor, i):
    tensor.detach().numpy().reshape(-1)[i] += 1


def by_dlpack(tensor, i):
    torch.from_dlpack(torch.utils.dlpack.to_dlpack(tensor.detach())).view(-1)[i] += 1


def by_a_pointer(tensor, i):
    address = tensor.data_ptr() + i * tensor.element_size()
    ctypes.c_ubyte.from_address(address).value ^= 1 << random.randrange(8)


BEHIND = [by_data, by_numpy, by_dlpack, by_a_pointer]


def unsampled(tensor):
    """An element that is not among those that are looked at."""
    step = max(1, -(-tensor.numel() // module.SAMPLES))
    return random.choice([i for i in range(tensor.numel()) if i % step])


@pytest.mark.parametrize("edit", BEHIND)
def test_one_element_edited_behind_torchs_back_is_seen_where_a_document_is_made_or_loaded(tokenizer, edit):
    model = tiny_model()
    before = made(model, tokenizer)
    weight = random.choice([t for t in model.state_dict().values() if t.numel() > module.SAMPLES])
    edit(weight, unsampled(weight))
    with pytest.raises(IdentityError) as caught:
        match(before, model, tokenizer, where="a.kv")
    assert caught.value.field == "weights"
    assert made(model, tokenizer).weights == WeightsDigest()(model) != before.weights


@pytest.mark.parametrize("edit", BEHIND)
def test_control_between_the_samples_it_stays_unseen_until_then(edit):
    digest, model = WeightsDigest(), tiny_model()
    before = digest(model)
    edit(model.lm_head.weight, unsampled(model.lm_head.weight))
    assert digest(model) == before, "what the docstring says of a question"
    after = digest(model, every_byte=True)
    assert after != before and digest(model) == after == WeightsDigest()(model)


@pytest.mark.parametrize("edit", BEHIND)
def test_an_edit_of_a_whole_tensor_behind_torchs_back_is_seen_by_the_samples(edit):
    digest, model = WeightsDigest(), tiny_model()
    before, weight = digest(model), model.model.layers[1].mlp.up_proj.weight
    for i in range(weight.numel()):
        edit(weight, i)
    assert digest(model) != before


def test_every_byte_of_unchanged_weights_is_not_hashed_again(hashed):
    digest, model = WeightsDigest(), tiny_model()
    first = digest(model, every_byte=True)
    once = len(hashed)
    assert digest(model, every_byte=True) == first == digest(model) and len(hashed) == once


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float64])
def test_tensors_of_no_whole_words_are_summed_to_their_last_byte(dtype):
    held, digest = torch.nn.Module(), WeightsDigest()
    for n in range(20):
        held.register_buffer(f"b{n}", torch.zeros(n, dtype=dtype))
    held.register_buffer("scalar", torch.zeros((), dtype=dtype))
    before = module._sums(dict(held.state_dict()))
    assert digest(held) == digest(held, every_byte=True)
    for n in (*range(1, 20), None):
        last = held.scalar.view(1) if n is None else getattr(held, f"b{n}")[-1:]
        last.data.view(torch.uint8)[-1] ^= 1
        assert module._sums(dict(held.state_dict())) != before
        last.data.view(torch.uint8)[-1] ^= 1
    assert module._sums(dict(held.state_dict())) == before


def test_parts_of_a_tensor_have_the_sum_and_the_digest_of_the_whole(monkeypatch):
    """As on another device, where it is summed by torch a part at a time."""
    whole = torch.randint(0, 256, (1003,), dtype=torch.uint8)
    reads = (module._tensor_sum, module._tensor_digest)
    expected = [read(whole) for read in reads]
    monkeypatch.setattr(module, "_part_bytes", lambda flat: 64)
    monkeypatch.setattr(module.cpu, "block_sum", module.cpu.block_sum_torch)
    assert [read(whole) for read in reads] == expected


def test_names_shapes_and_dtypes_count():
    def of(name="a", shape=(2, 4), dtype=torch.float32):
        held = torch.nn.Module()
        held.register_buffer(name, torch.zeros(shape, dtype=dtype))
        return WeightsDigest()(held)

    digests = [of(), of(name="b"), of(shape=(4, 2)), of(dtype=torch.int32), of(shape=()), of(shape=(0, 4))]
    assert len(set(digests)) == len(digests) and of() == digests[0]


def test_values_count_whatever_the_strides():
    held, other = torch.nn.Module(), torch.nn.Module()
    values = torch.randn(6, 4)
    held.register_buffer("a", values)
    other.register_buffer("a", values.t().contiguous().t())
    assert WeightsDigest()(held) == WeightsDigest()(other)


def test_tied_weights_are_hashed_once_and_equal_untied_ones(hashed):
    tied = tiny_model(tie_word_embeddings=True)
    tied.tie_weights()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    digest = WeightsDigest()(tied)
    assert len(hashed) == len(tied.state_dict()) - 1
    untied = tiny_model()
    untied.load_state_dict(tied.state_dict())
    assert WeightsDigest()(untied) == digest


def test_inference_tensors_are_hashed_every_time(hashed):
    with torch.inference_mode():
        model = tiny_model()
    digest = WeightsDigest()
    assert digest(model) == digest(model) and len(hashed) == 2 * len(model.state_dict())


def test_nothing_is_kept_of_a_model_that_is_gone():
    digest, model = WeightsDigest(), tiny_model()
    digest(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and not digest._known


def test_weights_that_are_not_in_memory_are_refused():
    with torch.device("meta"):
        model = torch.nn.Linear(4, 4)
    with pytest.raises(UnsupportedError, match=r"weights\.weight: found on the meta device"):
        weights_digest(model)


class Adapted(torch.nn.Linear):
    """What an adapter's layer shows of itself."""

    active_adapters = ("terse",)
    merged_adapters = ()
    disable_adapters = False

    def __init__(self):
        super().__init__(4, 4)
        self.scaling = {"terse": 2.0}


@pytest.mark.parametrize(
    "change",
    [{"scaling": {"terse": 1.0}}, {"active_adapters": ()}, {"disable_adapters": True}, {"merged_adapters": ("terse",)}],
)
def test_active_adapters_count(change):
    model = torch.nn.Sequential(Adapted())
    before = weights_digest(model)
    assert weights_digest(model) == before
    for name, value in change.items():
        setattr(model[0], name, value)
    assert weights_digest(model) != before


def test_a_compiled_model_is_the_same_model():
    model = tiny_model()
    assert weights_digest(SimpleNamespace(_orig_mod=model)) == weights_digest(model)
