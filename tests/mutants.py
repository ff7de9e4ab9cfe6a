"""Would the tests see a mistake? Each mutant is one wrong line in a copy of the tree; a test named beside it has to fail.

    python tests/mutants.py [-j 2] [-k WORD]     all mutants, or those whose name or file holds the word

    caught    by tests/test_pages.py::test_a_fork_shares_whole_pages[...] in 4.1 s: pages: a page two slots read is not copied
    SURVIVED  ...

First the same tests run on the tree as it is and have to pass: a test that fails anyway catches nothing. Then a mutant counts
as caught only where a test failed; one that cannot be built, imported or collected, or that runs out of time, does not.
Exit status 0 if all were caught, 1 otherwise. Copies lie in a temporary folder that goes when this ends, however it ends.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT_S = 300.0
"""Of one run of pytest; the longest takes 20 s on the machine it was written on."""


class Mutant(NamedTuple):
    """`old`, which stands once in `file`, becomes `new`; one of `tests` (pytest's node ids, below tests/) must see it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    # -- masks: one key more than there is ---------------------------------------------------------------------------
    Mutant(
        "a prefix of the torch backend shows a pad key",
        "kvkern/plain.py",
        "scores[:, max(0, valid - first) :] = -math.inf",
        "scores[:, max(0, valid - first) + 1 :] = -math.inf",
        ("test_attention.py::test_prefixes_of_any_length",),
    ),
    Mutant(
        "a suffix of the torch backend shows the key after its last",
        "kvkern/plain.py",
        "hidden = tokens[None, :] >= chunk.lengths[:, None]",
        "hidden = tokens[None, :] > chunk.lengths[:, None]",
        ("test_attention.py::test_suffixes_of_any_length",),
    ),
    Mutant(
        "K2 shows the key after a row's last",
        "kvkern/kernels/suffix.py",
        "keys[None, :] < lengths[:, None]",
        "keys[None, :] <= lengths[:, None]",
        ("test_triton.py::test_a_tree_of_three_levels_agrees_with_fp64",),
    ),
    Mutant(
        "K1 shows a pad key",
        "kvkern/kernels/prefix.py",
        "(whole + tl.arange(0, BLOCK_N) < end)",
        "(whole + tl.arange(0, BLOCK_N) <= end)",
        ("test_triton.py::test_a_tree_of_three_levels_agrees_with_fp64",),
    ),
    Mutant(
        "a suffix of the cpu backend shows every row the longest row's keys",
        "csrc/attention_impl.h",
        "const std::int64_t seen = shortest - begin < 0 ? 0 : shortest - begin;",
        "const std::int64_t seen = longest - begin < 0 ? 0 : longest - begin;",
        ("test_native.py::test_extends_of_many_rows_beside_decode_rows",),
    ),
    Mutant(
        "a prefix of the cpu backend shows its pad keys",
        "csrc/attention_impl.h",
        "min((seg + 1) * node.segment, node.tokens)",
        "min((seg + 1) * node.segment, node.padded)",
        ("test_native.py::test_prefixes_of_any_length",),
    ),
    # -- the fold: its order, and its one rounding -------------------------------------------------------------------
    Mutant(
        "the torch backend folds a node's segments into the path one by one",
        "kvkern/plain.py",
        "done = any_node & (flag != CONTINUES)",
        "done = any_node",
        ("test_exact.py::test_every_node_of_a_path_may_be_split",),
    ),
    Mutant(
        "K2 takes a node's later segments for nodes of their own",
        "kvkern/kernels/suffix.py",
        "if flag == 2:",
        "if flag == 3:",
        ("test_triton.py::test_a_node_walked_by_one_two_or_three_workers_gives_the_same_bits",),
    ),
    Mutant(
        "K1 folds the later segment first",
        "kvkern/kernels/prefix.py",
        "fold(m_total, l_total, acc_total, m, l, acc)",
        "fold(m, l, acc, m_total, l_total, acc_total)",
        ("test_triton.py::test_a_node_walked_by_one_two_or_three_workers_gives_the_same_bits",),
    ),
    Mutant(
        "Triton's fold rounds its product apart",
        "kvkern/kernels/state.py",
        "tl.fma(l, a, l_next * b), tl.fma(acc, a[:, None], acc_next * b[:, None])",
        "l * a + l_next * b, acc * a[:, None] + acc_next * b[:, None]",
        ("test_compile.py::test_the_fold_is_fused_where_it_says_so",),
    ),
    Mutant(
        "the cpu backend's K1 folds the later segment first",
        "csrc/attention_impl.h",
        "fold(group.total, group.state, group, d);\n        }\n    }\n    if (unit.seg_begin == 0)",
        "fold(group.state, group.total, group, d), swap(group.state, group.total);\n        }\n    }\n"
        "    if (unit.seg_begin == 0)",
        ("test_native.py::test_segments_on_one_worker_or_many_have_the_same_bits",),
    ),
    Mutant(
        "segments walked apart by several threads are folded last to first",
        "csrc/dispatch.cpp",
        "isa.fold({rows_, head_dim_, m, l, acc, all.m + at, all.l + at, all.acc + at * head_dim_, m, l, acc});",
        "isa.fold({rows_, head_dim_, all.m + at, all.l + at, all.acc + at * head_dim_, m, l, acc, m, l, acc});",
        ("test_native_bits.py::test_one_two_and_four_threads_walk_a_long_node_with_the_same_bits",),
    ),
    Mutant(
        "the cpu backend's merge is another fold than its kernels'",
        "csrc/attention_impl.h",
        "fma(call.acc_a[i], alpha, call.acc_b[i] * beta)",
        "fma(call.acc_b[i], beta, call.acc_a[i] * alpha)",
        ("test_native.py::test_merge_is_the_fold_of_the_kernels",),
    ),
    # -- cuts --------------------------------------------------------------------------------------------------------
    Mutant(
        "a prefix may have 32 segments",
        "kvkern/geometry.py",
        "-(-tokens // 16 // PAD) * PAD",
        "-(-tokens // 32 // PAD) * PAD",
        ("test_attention.py::test_prefixes_whose_segments_are_longer_than_1024_tokens",),
    ),
    Mutant(
        "a node's work ends with the rows of its first agent",
        "kvkern/plan.py",
        "            ranges[prefix][1] = qo_indptr[n + 1]\n",
        "",
        ("test_plan.py::test_every_row_folds_every_segment_of_its_path_once_and_in_order",),
    ),
    Mutant(
        "a work item goes past its node's rows",
        "kvkern/plan.py",
        "end = min(begin + item_rows, last_row)",
        "end = begin + item_rows",
        ("test_plan.py::test_an_item_has_at_most_128_packed_rows",),
    ),
    Mutant(
        "later walks of a node start one state early",
        "kvkern/plan.py",
        "state + 1 + first - run",
        "state + first - run",
        ("test_plan.py::test_every_row_folds_every_segment_of_its_path_once_and_in_order",),
    ),
    Mutant(
        "a step counts one row an agent on the device",
        "kvkern/plan.py",
        "index_add_(0, self._slots, self._counts)",
        "index_add_(0, self._slots, torch.ones_like(self._counts))",
        ("test_plan.py::test_begin_counts_the_rows_on_host_and_device_once",),
    ),
    # -- pages -------------------------------------------------------------------------------------------------------
    Mutant(
        "a page is free while another slot reads it",
        "kvkern/pages.py",
        "if self._references[page] == 0:",
        "if self._references[page] <= 1:",
        ("test_pages.py::test_a_fork_shares_whole_pages_and_copies_the_partly_filled_one_when_it_is_written",),
    ),
    Mutant(
        "a page that two slots read is not copied before it is written",
        "kvkern/pages.py",
        "if self._references[table[i]] > 1]",
        "if self._references[table[i]] > 2]",
        ("test_pages.py::test_a_fork_shares_whole_pages_and_copies_the_partly_filled_one_when_it_is_written",),
    ),
    Mutant(
        "the copy of a shared page lacks its values",
        "kvkern/pages.py",
        "self.pages[:, :, page] = self.pages[:, :, table[index]]",
        "self.pages[:, :1, page] = self.pages[:, :1, table[index]]",
        ("test_pages.py::test_a_fork_shares_whole_pages_and_copies_the_partly_filled_one_when_it_is_written",),
    ),
    Mutant(
        "a preempted sequence keeps its count of computed tokens",
        "kvkern/scheduler.py",
        "sequence.computed, sequence.state = 0, WAITING",
        "sequence.state = WAITING",
        ("test_scheduler.py::test_a_resumed_sequence_is_cut_where_it_was",),
    ),
    # -- integrity ---------------------------------------------------------------------------------------------------
    Mutant(
        "a published block stays writable",
        "kvkern/prefix.py",
        "            self._mapping.protect()",
        "            self._mapping.view()",
        ("test_prefix.py::test_a_write_to_a_published_block_kills_the_process",),
    ),
    Mutant(
        "check compares the first layer alone",
        "kvkern/prefix.py",
        "(self.block_sums() != self._sums)",
        "(self.block_sums()[:1] != self._sums[:1])",
        ("test_prefix.py::test_check_names_the_layer_the_tensor_and_the_segment_of_a_flipped_bit",),
    ),
    Mutant(
        "the sum of a block forgets where a word stands",
        "csrc/blocksum.h",
        "((factor + lane * GOLDEN) | 1)",
        "(factor | 1)",
        ("test_cpu.py::test_the_sum_is_the_same_by_hand_in_cpp_and_in_torch",),
    ),
    Mutant(
        "a block's digest is not compared",
        "kvkern/store.py",
        "if digest != needed:",
        "if len(digest) != len(needed):",
        ("test_store.py::test_a_flipped_byte_of_a_block_is_named",),
    ),
    Mutant(
        "a block that changed on its way to the device is served",
        "kvkern/store.py",
        "        if a != b:",
        "        if not a and b:",
        ("test_store.py::test_control_a_block_that_changed_after_the_digests_is_seen",),
    ),
    Mutant(
        "only the fields that a file has are compared with the model's",
        "kvkern/identity.py",
        "for key in sorted({*found, *needed}):",
        "for key in sorted(found):",
        ("test_identity.py::test_another_model_is_refused_with_the_field_named",),
    ),
    Mutant(
        "a field that a file leaves empty is no difference",
        "kvkern/identity.py",
        "    elif found != needed:",
        "    elif found is not None and found != needed:",
        ("test_identity.py::test_token_ids_need_no_tokenizer",),
    ),
    # -- numbers of a row --------------------------------------------------------------------------------------------
    Mutant(
        "the random number follows the place in the batch",
        "kvkern/sampling.py",
        "uniform(p.seed, positions[i])",
        "uniform(p.seed, i)",
        ("test_sampling.py::test_a_row_gets_the_same_token_alone_and_among_64_in_any_order",),
    ),
    Mutant(
        "the engine's repetition penalty leaves the document out",
        "kvkern/engine.py",
        "seen = document.path_token_ids()",
        "seen = document.path_token_ids()[:0]",
        ("test_engine.py::test_the_repetition_penalty_counts_the_documents_tokens",),
    ),
    Mutant(
        "a step is padded to the next bucket but one",
        "kvkern/linear.py",
        "if bucket >= rows:",
        "if bucket > rows:",
        ("test_linear.py::test_rows_for_is_the_smallest_bucket_that_holds_them",),
    ),
    Mutant(
        "the smallest class of buckets is taken",
        "kvkern/linear.py",
        "best, members = max(classes.items()",
        "best, members = min(classes.items()",
        ("test_linear.py::test_control_a_bucket_in_which_any_module_has_other_bits_is_out",),
    ),
    Mutant(
        "an agent's positions start with its suffix, not after the document",
        "kvkern/engine.py",
        "start = self._requests[suffix].prefix.end + first",
        "start = self._requests[suffix].prefix.position + first",
        ("test_exact_engine.py::test_reuse_is_as_exact_as_transformers_from_scratch",),
    ),
    # -- transformers' generate ---------------------------------------------------------------------------------------
    Mutant(
        "generate's positions start with the suffix, not after the document",
        "kvkern/generate.py",
        "(mask.cumsum(-1) - 1).clamp(min=0) + prefix.end",
        "(mask.cumsum(-1) - 1).clamp(min=0) + prefix.position",
        ("test_generate.py::test_greedy_over_a_ragged_batch_is_transformers_on_the_whole_prompt",),
    ),
    Mutant(
        "processors are shown the document before the padding",
        "kvkern/generate.py",
        "        if not self.ragged:",
        "        if self.ragged or not self.ragged:",
        ("test_generate.py::test_logits_processors_are_shown_what_they_would_be_shown_without_a_prefix",),
    ),
    Mutant(
        "an answer that is not cached yet is taken for cached",
        "kvkern/generate.py",
        "_fed(sequences[:, : cache.seq_length], mask, copies)",
        "_fed(sequences, mask, copies)",
        ("test_generate.py::test_a_conversation_goes_on_from_the_returned_cache",),
    ),
    Mutant(
        "rows that are in the pages are computed again",
        "kvkern/qwen3.py",
        "counts = [max(0, end - max(start, begin)) for start in self.starts]",
        "counts = [max(0, end - begin) for start in self.starts]",
        ("test_generate.py::test_a_conversation_may_go_back_and_change_anywhere",),
    ),
    Mutant(
        "beams are not reordered",
        "kvkern/qwen3.py",
        "        self.batch_select_indices(beam_idx)",
        "        self._need_rows(len(beam_idx))",
        ("test_generate.py::test_beams_are_transformers_with_their_scores",),
    ),
)


# -- a copy of the tree ------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The whole run is being ended; what a child process said means nothing."""


class Children:
    """The processes that run now, so that none is left when this one ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, command: Sequence[str], *, cwd: Path, env: dict[str, str]) -> tuple[int | None, str]:
        """(exit status, all that was said); None where it ran out of time."""
        with self._lock:
            if self._stopped:
                raise Stopped
            child = subprocess.Popen(
                command,
                cwd=cwd,
                env=env,
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.add(child)
        try:
            said, _ = child.communicate(timeout=TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            _kill(child)
            return None, child.communicate()[0]
        finally:
            with self._lock:
                self._running.discard(child)
        if self._stopped:
            raise Stopped
        return child.returncode, said

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for child in self._running:
                _kill(child)


def _kill(child: subprocess.Popen[str]) -> None:
    """The process and all that it started."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)


class Copy:
    """The tracked files as they are now, with the extension as it is built, in a folder of its own."""

    def __init__(self, folder: Path, children: Children) -> None:
        self.folder, self.children = folder, children
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in [*listed.stdout.split("\0"), *(str(so.relative_to(ROOT)) for so in ROOT.glob("kvkern/_C*.so"))]:
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        # Nothing compiled is kept: two mutants of one size within a second would share it.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COVERAGE_"))}
        self.env = kept | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
        self.env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        where = "import kvkern, kvkern._C; print(kvkern.__file__, kvkern._C.__file__, sep='\\n')"
        status, said = self.python("-c", where)
        files = said.splitlines()[-2:]
        if status or not all(Path(file).is_relative_to(folder) for file in files):
            raise SystemExit(f"a copy in {folder} is not what Python imports there:\n{said}")

    def python(self, *words: str) -> tuple[int | None, str]:
        return self.children.run([sys.executable, *words], cwd=self.folder, env=self.env)

    def test(self, *words: str) -> tuple[int | None, str]:
        options = ("-q", "--tb=short", "-m", "", "-p", "no:cacheprovider", "-p", "no:xdist")
        return self.python("-m", "pytest", *options, *words)

    def build(self) -> tuple[int | None, str]:
        """csrc/ -> kvkern/_C*.so; only what changed is compiled again, but for the first time."""
        return self.python("setup.py", "-q", "build_ext", "--inplace")

    @contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[tuple[int | None, str]]:
        """The copy with the mistake in it; what building it gave."""
        file = self.folder / mutant.file
        text = file.read_text()
        file.write_text(text.replace(mutant.old, mutant.new))
        try:
            yield self.build() if mutant.file.startswith("csrc/") else (0, "")
        finally:
            file.write_text(text)

    def try_out(self, mutant: Mutant) -> tuple[bool, str]:
        """(caught, what happened)."""
        started = time.monotonic()
        with self.mutated(mutant) as (status, said):
            if status == 0:
                status, said = self.test("-x", *_below_tests(mutant.tests))
            else:
                status = -1
        took = f"in {time.monotonic() - started:.1f} s"
        failed = re.search(r"^FAILED (\S+)", said, re.MULTILINE)
        if status == 1 and failed:
            return True, f"caught    by {failed[1]} {took}: {mutant.name}"
        if status == 0:
            return False, f"SURVIVED  {took}: {mutant.name} ({mutant.file})"
        why = "out of time" if status is None else "not built" if status == -1 else f"pytest's exit status {status}"
        return False, f"SURVIVED  without a verdict, {why} {took}: {mutant.name} ({mutant.file})\n{said}"


def _below_tests(tests: Sequence[str]) -> list[str]:
    return [f"tests/{test}" for test in tests]


# -- all of them -------------------------------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None, mutants: Sequence[Mutant] = MUTANTS) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-j", type=int, default=2, metavar="N", help="so many at a time (2)")
    parser.add_argument("-k", default="", metavar="WORD", help="only mutants whose name or file holds it")
    options = parser.parse_args(words)
    chosen = [m for m in mutants if options.k in m.name or options.k in m.file]
    if not chosen:
        parser.error(f"no mutant's name or file holds {options.k!r}")
    for mutant in chosen:
        times = (ROOT / mutant.file).read_text().count(mutant.old)
        if times != 1:
            parser.error(f"{mutant.name}: {mutant.file} has {mutant.old!r} {times} times, not once")

    started = time.monotonic()
    children = Children()
    with tempfile.TemporaryDirectory(prefix="kvkern-mutants-") as folder:
        with ThreadPoolExecutor(options.j) as pool:
            try:
                missed = _run(chosen, [Copy(Path(folder, str(n)), children) for n in range(options.j)], pool)
            except BaseException:
                children.stop()
                pool.shutdown(cancel_futures=True)
                raise
    print(f"{len(chosen) - missed} of {len(chosen)} mutants caught in {time.monotonic() - started:.0f} s", flush=True)
    return 1 if missed else 0


def _run(mutants: Sequence[Mutant], copies: Sequence[Copy], pool: ThreadPoolExecutor) -> int:
    """How many were not caught. Raises SystemExit where the tests fail without a mutant."""
    idle: SimpleQueue[Copy] = SimpleQueue()
    for copy in copies:
        idle.put(copy)

    @contextmanager
    def borrowed() -> Iterator[Copy]:
        copy = idle.get()
        try:
            yield copy
        finally:
            idle.put(copy)

    def control() -> tuple[bool, str]:
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        with borrowed() as copy:
            status, said = copy.test(*_below_tests(tests))
        if status != 0:
            raise SystemExit(f"without a mutant the tests do not pass, exit status {status}:\n{said}")
        return True, f"control   {said.splitlines()[-1]}: without a mutant all of these tests pass"

    def one(mutant: Mutant) -> tuple[bool, str]:
        with borrowed() as copy:
            return copy.try_out(mutant)

    # The copy that a mutant of csrc/ was built in runs nothing else before it is built again, so these come last.
    ordered = sorted(mutants, key=lambda m: m.file.startswith("csrc/"))
    missed = 0
    for done in as_completed([pool.submit(control), *(pool.submit(one, mutant) for mutant in ordered)]):
        caught, line = done.result()
        print(line, flush=True)
        missed += not caught
    return missed


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
