"""Sampling: the tokens transformers keeps, the numbers of Philox, no row that sees another, and text cut where it must be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvkern.errors import RequestError, ShapeError, UnsupportedError
from kvkern.sampling import SamplingParams, TextStream, draw, keep, penalise, philox, sample, uniform


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def params(**given: object) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 8, **given})  # type: ignore[arg-type]


# -- the random number -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    assert philox(counter, key) == words


def test_uniform_depends_on_all_bits_of_seed_and_position_and_stays_below_one():
    numbers = {uniform(1 << a, 1 << b) for a in range(64) for b in range(64)}
    assert len(numbers) == 64 * 64
    assert all(0 <= u < 1 and u * 2**53 == int(u * 2**53) for u in numbers)
    assert uniform(3, 5) != uniform(5, 3)


def test_uniform_is_uniform_over_seeds_and_over_positions():
    for numbers in ([uniform(s, 7) for s in range(20_000)], [uniform(7, p) for p in range(20_000)]):
        counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
        # 19 degrees of freedom: 60 is passed with a probability of 4e-6.
        assert ((counts - 1000) ** 2 / 1000).sum() < 60


# -- what is kept ------------------------------------------------------------------------------------------------------


def by_transformers(scores, p, seen=None):
    """The processors of generate, in its order."""
    chain = LogitsProcessorList()
    if p.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.temperature != 1:
        chain.append(TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        chain.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        chain.append(TopPLogitsWarper(p.top_p))
    return chain(seen, scores)


def by_kvkern(scores, p, seen=None):
    rows = []
    for i, row in enumerate(scores.clone()):
        if p.repetition_penalty != 1:
            penalise(row, seen[i], p.repetition_penalty)
        rows.append(keep(row, p))
    return torch.stack(rows)


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 1000, 49152])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-9])
@pytest.mark.parametrize("top_k", [None, 1, 20, 10**6])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_scores_are_those_of_transformers_bit_for_bit(generator, vocabulary, top_p, top_k, temperature):
    scores = torch.randn(4, vocabulary, generator=generator) * 4
    p = params(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
    assert torch.equal(by_kvkern(scores, p), by_transformers(scores, p))


@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("top_p", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("top_k", [None, 3])
def test_ties_and_sums_at_the_bound_fall_as_in_transformers(generator, levels, top_p, top_k):
    scores = torch.randint(0, levels, (30, 10), generator=generator).float()
    scores[:, ::3] *= -1  # zeros of both signs
    p = params(do_sample=True, top_k=top_k, top_p=top_p)
    assert torch.equal(by_kvkern(scores, p), by_transformers(scores, p))


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_penalty_is_that_of_transformers_and_repeats_count_once(generator, penalty):
    scores = torch.randn(3, 50, generator=generator)
    seen = torch.randint(0, 50, (3, 40), generator=generator)
    p = params(repetition_penalty=penalty)
    expected = by_transformers(scores, p, seen)
    assert torch.equal(by_kvkern(scores, p, seen), expected)
    assert torch.equal(by_kvkern(scores, p, [set(row.tolist()) for row in seen]), expected)


def test_control_another_order_of_the_steps_is_caught(generator):
    scores = torch.randn(20, 100, generator=generator)
    p = params(do_sample=True, temperature=0.5, top_p=0.8)
    swapped = TemperatureLogitsWarper(0.5)(None, TopPLogitsWarper(0.8)(None, scores))
    assert not torch.equal(by_kvkern(scores, p), swapped)


# -- the draw ----------------------------------------------------------------------------------------------------------


def test_drawn_tokens_follow_the_distribution(generator):
    scores = torch.randn(12, generator=generator) * 2
    p = params(do_sample=True, top_k=9, top_p=0.95, temperature=0.8)
    expected = by_transformers(scores[None], p)[0].double().softmax(-1) * 5_000
    drawn = [
        sample(scores[None], [params(do_sample=True, top_k=9, top_p=0.95, temperature=0.8, seed=s)], [0])[0]
        for s in range(5_000)
    ]
    counts = torch.bincount(torch.tensor(drawn), minlength=12)
    assert not counts[expected == 0].any()
    kept = expected > 0
    # At most 8 degrees of freedom: 45 is passed with a probability of 4e-7.
    assert ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum() < 45


def test_the_draw_reaches_every_kept_token_and_no_other():
    scores = torch.tensor([0.0, -math.inf, 0.0, -2000.0, 0.0, -math.inf])
    thirds = [draw(scores, u) for u in (0.0, 0.33, 0.34, 0.66, 0.67, 1 - 2**-53)]
    assert thirds == [0, 0, 2, 2, 4, 4]
    # A share too small for fp64 is never drawn, not even by the largest number.
    assert draw(torch.tensor([0.0, -2000.0]), 1 - 2**-53) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_token_alone_and_among_64_in_any_order(generator, dtype):
    logits = (torch.randn(64, 3000, generator=generator) * 3).to(dtype)
    everyone = [
        params(
            do_sample=i % 3 > 0,
            temperature=1.0 + (i % 5) / 4,
            top_k=(None, 40)[i % 2],
            top_p=(1.0, 0.9, 0.4)[i % 3],
            repetition_penalty=(1.0, 1.2)[i % 4 == 0],
            seed=i,
        )
        for i in range(64)
    ]
    history = [torch.randint(0, 3000, (9,), generator=generator) for _ in range(64)]
    positions = list(range(100, 164))
    before = logits.clone()
    together = sample(logits, everyone, positions, history)
    assert torch.equal(logits, before)
    for i in range(64):
        assert sample(logits[i : i + 1], [everyone[i]], [positions[i]], [history[i]]) == [together[i]]
    order = torch.randperm(64, generator=generator).tolist()
    shuffled = sample(
        logits[order], [everyone[i] for i in order], [positions[i] for i in order], [history[i] for i in order]
    )
    assert shuffled == [together[i] for i in order]


def test_control_another_seed_or_position_gives_other_tokens(generator):
    logits = torch.randn(1, 3000, generator=generator).expand(50, -1)

    def drawn(seed, position):
        return sample(logits, [params(do_sample=True, seed=seed)] * 50, [position + i for i in range(50)])

    assert drawn(1, 0) == drawn(1, 0)
    assert drawn(1, 0) != drawn(2, 0)
    assert drawn(1, 0) != drawn(1, 1)


def test_greedy_takes_the_first_of_equal_maxima():
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 5.0, 5.0], [-1.0, -3.0, -1.0]])
    assert sample(logits, [params()] * 3, [0, 0, 0]) == [1, 0, 0]
    assert sample(logits, [params(repetition_penalty=1.5)] * 3, [0, 0, 0], [{1}, {0}, {0}]) == [2, 1, 2]


def test_a_row_without_a_finite_maximum_is_refused_by_name():
    for bad in (math.nan, math.inf):
        with pytest.raises(RequestError, match=r"^logits: found a maximum of (nan|inf)"):
            sample(torch.tensor([[0.0, bad]]), [params(do_sample=True)], [0])


def test_lists_of_another_length_and_a_missing_history_are_refused_by_name():
    logits = torch.zeros(2, 4)
    with pytest.raises(ShapeError, match=r"^params: found 1 entries, needed 2"):
        sample(logits, [params()], [0, 0])
    with pytest.raises(ShapeError, match=r"^positions: found 3 entries, needed 2"):
        sample(logits, [params()] * 2, [0, 0, 0])
    with pytest.raises(RequestError, match=r"^history: found none"):
        sample(logits, [params(repetition_penalty=2.0)] * 2, [0, 0])


# -- parameters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", -1),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("do_sample", 1),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 1 << 64),
        ("eos_token_ids", {"2"}),
        ("eos_token_ids", {-1}),
        ("stop_strings", ("a", "")),
        ("stop_strings", "abc"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(name, value):
    with pytest.raises(RequestError, match=f"^{name}: found ") as error:
        params(**{name: value})
    assert error.value.field == name and error.value.found == repr(value)


def test_a_generation_config_is_taken_as_generate_takes_it():
    model = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, eos_token_id=[7, 9], max_length=2048)
    own = GenerationConfig(max_new_tokens=5, temperature=0.3, stop_strings="END")
    p = SamplingParams.from_generation_config(own, defaults=model, seed=3)
    assert p == params(
        max_new_tokens=5,
        do_sample=True,
        temperature=0.3,
        top_k=20,
        eos_token_ids=frozenset({7, 9}),
        stop_strings=("END",),
        seed=3,
    )
    # What nobody set is what generate takes: top_k is 50 there.
    assert SamplingParams.from_generation_config(max_new_tokens=1, eos_token_id=4) == params(
        max_new_tokens=1, top_k=50, eos_token_ids=frozenset({4})
    )
    assert SamplingParams.from_generation_config(own, max_new_tokens=0, eos_token_ids=frozenset()).max_new_tokens == 0


UNSUPPORTED = {
    "num_beams": 2,
    "num_return_sequences": 2,
    "penalty_alpha": 0.6,
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[3]],
    "min_length": 4,
    "min_new_tokens": 4,
    "max_time": 3.0,
    "use_mtp": True,
    "cache_implementation": "static",
    "renormalize_logits": True,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 0,
    "suppress_tokens": [1],
    "sequence_bias": [[[1], 2.0]],
    "guidance_scale": 1.5,
    "exponential_decay_length_penalty": (3, 1.1),
    "prompt_lookup_num_tokens": 3,
    "output_scores": True,
    "return_dict_in_generate": True,
    "token_healing": True,
    "encoder_repetition_penalty": 1.2,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_field_with_a_meaning_that_is_lacking_is_refused_by_its_name(name):
    config = GenerationConfig(max_new_tokens=5)
    setattr(config, name, UNSUPPORTED[name])
    for arguments in ({"config": config}, {"config": GenerationConfig(max_new_tokens=5), "defaults": config}):
        with pytest.raises(UnsupportedError, match=f"^{name}: found "):
            SamplingParams.from_generation_config(**arguments)
    with pytest.raises(UnsupportedError, match=f"^{name}: found "):
        SamplingParams.from_generation_config(max_new_tokens=5, **{name: UNSUPPORTED[name]})


@pytest.mark.parametrize("name", ["min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"])
def test_a_sampling_field_that_is_lacking_is_refused_only_where_it_would_act(name):
    config = GenerationConfig(max_new_tokens=5)
    setattr(config, name, 0.5)
    assert SamplingParams.from_generation_config(config) == params(max_new_tokens=5, top_k=50)
    with pytest.raises(UnsupportedError, match=f"^{name}: found 0.5"):
        SamplingParams.from_generation_config(config, do_sample=True)


def test_every_default_of_generate_is_accepted():
    config = GenerationConfig(**{**GenerationConfig._get_default_generation_params(), "max_new_tokens": 3})
    assert SamplingParams.from_generation_config(config, do_sample=True).max_new_tokens == 3


def test_max_length_does_not_stand_in_for_max_new_tokens():
    for config in (GenerationConfig(max_length=30), GenerationConfig(), None):
        with pytest.raises(RequestError, match=r"^max_new_tokens: found none"):
            SamplingParams.from_generation_config(config)


def test_an_unknown_name_is_refused():
    with pytest.raises(UnsupportedError, match=r"^temprature: found 0\.5"):
        SamplingParams.from_generation_config(max_new_tokens=3, temprature=0.5)


# -- the text ----------------------------------------------------------------------------------------------------------

WORDS = "the cat sat on the mat; stop here. naïve façade — 汉字 и слово 🎉👩‍👩‍👧 STOP"


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def metaspace() -> PreTrainedTokenizerFast:
    """Like Llama 2: a decoder that strips the first space, and bytes for what has no token."""
    vocabulary = [f"<0x{b:02X}>" for b in range(256)] + ["▁", "▁a", "a", "b", "st", "op", "▁stop", "<eos>"]
    model = models.BPE(vocab={v: i for i, v in enumerate(vocabulary)}, merges=[], byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


TOKENIZERS = {"bytes": byte_level(), "metaspace": metaspace()}


def cut_naively(text: str, stops: list[str]) -> str:
    """Read character by character; at the first end of a stop string, cut before the longest that ends there."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


def stream_of(tokenizer, ids, stops=()):
    stream = TextStream(tokenizer, stops)
    given = [stream.push(i) for i in ids]
    given.append(stream.finish())
    assert "".join(given) == stream.text
    return stream, given


@given(
    ids=st.lists(st.integers(0, 299), max_size=40),
    stops=st.lists(st.text("toph .aè", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_the_text_is_the_decoding_cut_before_the_first_stop_string(ids, stops):
    tokenizer = TOKENIZERS["bytes"]
    ids = [i % len(tokenizer) for i in ids]
    stream, _ = stream_of(tokenizer, ids, stops)
    expected = cut_naively(tokenizer.decode(ids, skip_special_tokens=True), stops)
    assert stream.text == expected
    assert stream.stopped == (expected != tokenizer.decode(ids, skip_special_tokens=True))


@given(
    text=st.text("th cat sop.é汉🎉", max_size=30),
    stops=st.lists(st.text("atsop. é汉", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_no_half_character_and_nothing_of_a_stop_string_is_given_early(text, stops):
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer(text)["input_ids"]
    whole = cut_naively(text, stops)
    stream = TextStream(tokenizer, stops)
    seen = ""
    for i in ids:
        seen += stream.push(i)
        assert whole.startswith(seen)
    assert seen + stream.finish() == whole


@given(ids=st.lists(st.sampled_from([256, 257, 258, 259, 260, 261, 262, 263]), max_size=30))
@settings(max_examples=200, deadline=None)
def test_a_decoder_that_strips_the_first_space_strips_no_other(ids):
    tokenizer = TOKENIZERS["metaspace"]
    assert stream_of(tokenizer, ids)[0].text == tokenizer.decode(ids, skip_special_tokens=True)


def test_bytes_that_stand_for_a_character_are_given_when_it_is_whole():
    tokenizer = TOKENIZERS["metaspace"]
    party = list("🎉".encode())
    _, given = stream_of(tokenizer, [257, *party, 258])
    assert given == ["a", "", "", "", "🎉", "a", ""]


def test_text_is_given_as_soon_as_it_is_certain():
    tokenizer = TOKENIZERS["bytes"]
    letters = [tokenizer.convert_tokens_to_ids(c) for c in "abcST"]
    stream = TextStream(tokenizer, ["STOP"])
    assert [stream.push(i) for i in letters] == ["a", "b", "c", "", ""]
    assert stream.push(letters[0]) == "STa"


def test_nothing_comes_after_a_stop_string():
    tokenizer = TOKENIZERS["bytes"]
    stream = TextStream(tokenizer, ["b"])
    a, b = (tokenizer.convert_tokens_to_ids(c) for c in "ab")
    assert [stream.push(i) for i in (a, b, a)] == ["a", "", ""]
    assert stream.stopped and stream.finish() == "" and stream.text == "a"


def test_of_two_stop_strings_the_one_that_is_whole_first_cuts_wherever_tokens_divide_them():
    tokenizer = TOKENIZERS["bytes"]
    text = "xabcd"
    parts = [tokenizer.convert_tokens_to_ids(c) for c in text]
    assert stream_of(tokenizer, parts, ["abcd", "bc"])[0].text == "xa"
    assert stream_of(tokenizer, tokenizer(text)["input_ids"], ["abcd", "bc"])[0].text == "xa"


def test_special_tokens_leave_no_text_and_an_incomplete_character_one_sign():
    tokenizer = TOKENIZERS["bytes"]
    a, eos = tokenizer.convert_tokens_to_ids("a"), tokenizer.eos_token_id
    half = tokenizer.convert_tokens_to_ids("Ã")  # the byte C3
    _, given = stream_of(tokenizer, [eos, a, eos, eos, a, half])
    assert given == ["", "a", "", "", "a", "", "\ufffd"]
