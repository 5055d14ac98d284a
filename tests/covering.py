"""The kernels of calls, and a few of many, in which the template arguments of all meet."""

import heapq
import re
from itertools import combinations

import numpy as np
import pytest

from rope_cupy import cpu
from rope_cupy.plan import launch_plan
from rope_cupy.template import instance


class FoundError(Exception):
    """A kernel would be launched; the argument is its template arguments."""


def kernel_of(call):
    """Return the template arguments of the first kernel of a call, which is not launched."""

    def find(problem, *_):
        raise FoundError(launch_plan(problem).template)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(FoundError) as found:
        patch.setattr(cpu, "rotate", find)
        call()
    return found.value.args[0]


def covering(kernels, count):
    """Fewer kernels: template arguments that meet in one of all, so many at a time, meet in one.

    What meets most that has not met before is chosen first, as in every greedy cover.
    """
    numbers, met = {}, []
    for kernel in kernels:
        words = [re.findall(r"\w+", instance("", argument)) for argument in kernel]
        places = [(i, j, word) for i, row in enumerate(words) for j, word in enumerate(row)]
        met.append(sorted(numbers.setdefault(place, len(numbers)) for place in places))
    powers = len(numbers) ** np.arange(count)
    met = [np.array([*combinations(each, count)]) @ powers for each in met]
    _, every = np.unique(np.concatenate(met), return_inverse=True)
    met = np.split(every, np.cumsum([len(each) for each in met])[:-1])
    missing = np.ones(every.max() + 1, bool)
    queue = [(-len(each), i) for i, each in enumerate(met)]  # a heap by what each can add at most
    heapq.heapify(queue)
    chosen = []
    while missing.any():
        _, i = heapq.heappop(queue)
        added = int(missing[met[i]].sum())
        if queue and added < -queue[0][0]:
            heapq.heappush(queue, (-added, i))
        else:
            chosen.append(kernels[i])
            missing[met[i]] = False
    return chosen
