"""Process groups of real processes that talk over gloo, for tests: forked, so that torch is not imported again."""

import multiprocessing
import traceback

import torch

from genray.parallel import torch_groups


def together(workers: dict, work, share_attack=False):
    """Runs `work(worker, own process group, that of all)` in one process a rank; returns the results by rank.

    Args:
        workers: learner name -> how many processes.
    """
    context, all_ranks = multiprocessing.get_context("fork"), torch_groups.worker_ranks(workers, share_attack)
    port, answers = context.SimpleQueue(), [context.SimpleQueue() for _ in all_ranks]
    args = (all_ranks, work, port)
    processes = [context.Process(target=_live, args=(s, *args, q)) for s, q in zip(all_ranks, answers)]
    for process in processes:
        process.start()
    found = [queue.get() for queue in answers]
    for process in processes:
        process.join()
    problems = [text for failed, text in found if failed]
    assert not problems, "\n".join(problems)
    return [answer for _, answer in found]


def alone(work):
    """Runs `work()` in a forked process: compiled backward passes start threads, after which no process may be forked
    that computes gradients."""
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=_answer, args=("alone", work, answer))
    process.start()
    failed, text = answer.get()
    process.join()
    assert not failed, text


def _live(worker, all_ranks, work, port, answer):
    _answer(worker.who, lambda: _joined(worker, all_ranks, work, port), answer)


def _answer(who, work, answer):
    """Puts (False, result of `work()`) or (True, what went wrong)."""
    try:
        torch.set_num_threads(1)  # a forked process has no thread pool
        answer.put((False, work()))
    except BaseException:
        answer.put((True, f"{who}: {traceback.format_exc()}"))


def _joined(worker, all_ranks, work, port):
    if worker.global_rank == 0:
        number = torch_groups.open_store(torch_groups.LOOPBACK)
        for _ in all_ranks[1:]:
            port.put(number)
    else:
        number = port.get()
    own, everyone = worker.own, worker.everyone
    where = [{"node": "here", "gpu_ids": [], "device": "cpu"}] * len(all_ranks)
    mine = {worker.learner: own, torch_groups.ALL_LEARNERS: everyone}
    torch_groups.join(
        worker,
        mine,
        torch_groups.group_specs_of(all_ranks, where),
        (torch_groups.LOOPBACK, number),
        torch_groups.LOOPBACK,
        300,
    )
    return work(worker, own, everyone)
