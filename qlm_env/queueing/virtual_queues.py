"""Virtual queues: one ordered list of request groups per instance; its order is the execution order."""

from __future__ import annotations

from qlm_env.compiled import kernel
from qlm_env.queueing.groups import Queues
from qlm_env.requests import NOWHERE


@kernel
def unlink(queues: Queues, g: int) -> None:
    """Take a group out of its virtual queue; it remembers which one it was."""
    group = queues.group[g]
    queue = queues.queue[group.queue]
    if group.previous == NOWHERE:
        queue.head = group.next
    else:
        queues.group[group.previous].next = group.next
    if group.next == NOWHERE:
        queue.tail = group.previous
    else:
        queues.group[group.next].previous = group.previous
    group.previous = NOWHERE
    group.next = NOWHERE
    group.queued = 0
    queue.groups -= 1
    queue.waiting -= group.waiting


@kernel
def link_after(queues: Queues, g: int, i: int, previous: int) -> None:
    """Put an unlinked group into instance ``i``'s queue behind ``previous`` (NOWHERE: at the front)."""
    group = queues.group[g]
    queue = queues.queue[i]
    group.queue = i
    group.queued = 1
    group.previous = previous
    if previous == NOWHERE:
        group.next = queue.head
        queue.head = g
    else:
        group.next = queues.group[previous].next
        queues.group[previous].next = g
    if group.next == NOWHERE:
        queue.tail = g
    else:
        queues.group[group.next].previous = g
    queue.groups += 1
    queue.waiting += group.waiting


@kernel
def can_place(queues: Queues, g: int, i: int) -> bool:
    """Whether a live group has something waiting and is not executing at another instance."""
    group = queues.group[g]
    return bool(group.waiting > 0 and (group.in_engine == 0 or group.queue == i))


@kernel
def place(queues: Queues, g: int, i: int, front: bool) -> None:
    """Put a group at the front or back of instance ``i``'s queue, moving it if it is in one."""
    if queues.group[g].queued:
        unlink(queues, g)
    link_after(queues, g, i, NOWHERE if front else queues.queue[i].tail)
