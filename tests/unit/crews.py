"""Crews of real processes that talk over gloo, for tests: forked, so that torch is not imported again."""

import multiprocessing
import traceback

import torch

from genray.parallel import torch_groups as crews


def together(workers: dict, work, share_attack=False):
    """Runs `work(seat, own crew, crew of all)` in one process a seat; returns what each gave, in the order of seats.

    Args:
        workers: learner name -> how many processes.
    """
    context, all_seats = multiprocessing.get_context("fork"), crews.seats(workers, share_attack)
    port, answers = context.SimpleQueue(), [context.SimpleQueue() for _ in all_seats]
    args = (all_seats, work, port)
    processes = [context.Process(target=_live, args=(s, *args, q)) for s, q in zip(all_seats, answers)]
    for process in processes:
        process.start()
    found = [queue.get() for queue in answers]
    for process in processes:
        process.join()
    problems = [text for failed, text in found if failed]
    assert not problems, "\n".join(problems)
    return [answer for _, answer in found]


def _live(seat, all_seats, work, port, answer):
    try:
        torch.set_num_threads(1)  # a forked process has no thread pool
        answer.put((False, _joined(seat, all_seats, work, port)))
    except BaseException:
        answer.put((True, f"{seat.who}: {traceback.format_exc()}"))


def _joined(seat, all_seats, work, port):
    if seat.place == 0:
        number = crews.open_store(crews.LOOPBACK)
        for _ in all_seats[1:]:
            port.put(number)
    else:
        number = port.get()
    own, everyone = seat.own, seat.everyone
    where = [{"node": "here", "gpu_ids": [], "device": "cpu"}] * len(all_seats)
    mine = {seat.learner: own, crews.EVERYONE: everyone}
    crews.join(seat, mine, crews.teams(all_seats, where), (crews.LOOPBACK, number), crews.LOOPBACK, 300)
    return work(seat, own, everyone)
