"""The wrong rules of the mutation check: where the source is right, and what is put there instead."""
# ruff: noqa: E501 (source text as it stands)

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    name: str
    rule: str  # of docs/scheduler.md
    path: str  # in kvsim/
    old: str  # occurs there exactly once
    new: str


SCHEDULE, BLOCKS, LOOP = "engine/schedule.py", "engine/blocks.py", "engine/loop.py"
QUEUES, COHORT = "engine/queues.py", "engine/cohort.py"
STATE, KEYS, RUN = "engine/state.py", "engine/keys.py", "run.py"
REGIONS = "engine/regions.py"
ALLOCATORS = "allocators"  # the rule of what is docs/allocators.md's

MUTATIONS = (
    Mutation(
        "the null block is in use like any other", "1.1", STATE,
        "usable = settings.num_gpu_blocks - 1",
        "usable = settings.num_gpu_blocks",
    ),
    Mutation(
        "blocks are taken from the end of the free list", "1.2", BLOCKS,
        '            b = free[at & mask]\n            while b == 0:  # a gap\n                at += 1\n                b = free[at & mask]\n            at += 1\n',
        '            last = now.free_end - 1\n            while free[last & mask] == 0:\n                last -= 1\n            b = free[last & mask]\n            free[last & mask] = 0\n',
    ),
    Mutation(
        "a look-up finds the newest block of a content", "1.3", BLOCKS,
        '            table[hits_at + k] = abs(b)\n',
        '            table[hits_at + k] = s.pool.copies[-b].older if b < 0 else b\n',
    ),
    Mutation(
        "a block that is taken keeps what it had cached", "1.4", BLOCKS,
        '            if blocks[b].key >= 0:\n                evict(pool, oldest, b)',
        '            if False:\n                evict(pool, oldest, b)',
    ),
    Mutation(
        "a block that is found stays in the free list", "1.5", BLOCKS,
        "                s.pool.free[-num_refs] = 0  # leaves a gap\n",
        "",
    ),
    Mutation(
        "freed blocks without a key go to the end of the free list", "1.6", BLOCKS,
        '            now.free_front -= 1\n            free[now.free_front & mask] = b\n            blocks[b].num_refs = -(now.free_front & mask)\n',
        '            free[now.free_end & mask] = b\n            blocks[b].num_refs = -(now.free_end & mask)\n            now.free_end += 1\n',
    ),
    Mutation(
        "freed blocks with a key go to the front of the free list", "1.6", BLOCKS,
        '        free[free_end & mask] = b\n        blocks[b].num_refs = -(free_end & mask)\n        free_end += 1\n',
        '        now.free_front -= 1\n        free[now.free_front & mask] = b\n        blocks[b].num_refs = -(now.free_front & mask)\n        now.free_blocks += 1\n        now.cached_blocks += 1\n',
    ),
    Mutation(
        "a free block that was moved is looked for where it was", "1.5", BLOCKS,
        "            pool.blocks[b].num_refs = -(end & mask)\n",
        "",
    ),
    Mutation(
        "the free list runs over what is in it", "1.6", BLOCKS,
        "        close_free_gaps(now, s.pool)\n",
        "        pass\n",
    ),
    Mutation(
        "cached blocks are freed first to last", "1.7", BLOCKS,
        '    for at in range(end - 1, start - 1, -1):\n        b = table[at]\n        if b == 0:\n            continue\n        num_held += 1\n        if blocks[b].num_refs > 1:\n            blocks[b].num_refs -= 1\n            continue\n        if blocks[b].key < 0:\n            first_plain = at\n',
        '    for at in range(start, end):\n        b = table[at]\n        if b == 0:\n            continue\n        num_held += 1\n        if blocks[b].num_refs > 1:\n            blocks[b].num_refs -= 1\n            continue\n        if blocks[b].key < 0:\n            first_plain = min(first_plain, at)\n',
    ),
    Mutation(
        "groups are freed in reverse order", "1.7", BLOCKS,
        '    for group in range(len(s.groups)):\n        start = table_start(now, s.groups, row, group)\n        free_entries(s, row, start, start + row.num_blocks)',
        '    for group in range(len(s.groups) - 1, -1, -1):\n        start = table_start(now, s.groups, row, group)\n        free_entries(s, row, start, start + row.num_blocks)',
    ),
    Mutation(
        "a block's key covers only the unit in which it starts", "1.8", KEYS,
        "depth = ((k + 1) * block_size - 1) // unit",
        "depth = k * block_size // unit",
    ),
    Mutation(
        "hits do not count as computed when blocks are asked for", "2.1", SCHEDULE,
        "tokens = min(num_hits * cfg.block_size + n, cfg.max_model_len)",
        "tokens = min(n, cfg.max_model_len)",
    ),
    Mutation(
        "the watermark holds while nothing runs", "2.2", SCHEDULE,
        "watermark = cfg.watermark_blocks if now.num_running > 0 else 0",
        "watermark = cfg.watermark_blocks",
    ),
    Mutation(
        "the watermark is a share of the usable blocks", "2.2", RUN,
        "int(settings.watermark * num_gpu_blocks)",
        "int(settings.watermark * (num_gpu_blocks - 1))",
    ),
    Mutation(
        "a running request leaves the watermark free", "2.2", SCHEDULE,
        '        needed = blocks_beyond(s, row.num_blocks, row.num_blocks + lacking, False)\n        if needed',
        '        needed = blocks_beyond(s, row.num_blocks, row.num_blocks + lacking, False) + s.settings[0].watermark_blocks\n        if needed',
    ),
    Mutation(
        "the gate asks for the prompt alone", "2.3", SCHEDULE,
        "    tokens = min(known_tokens(row), s.settings[0].max_model_len)",
        "    tokens = min(row.prompt, s.settings[0].max_model_len)",
    ),
    Mutation(
        "the gate takes hits that are free for nothing", "2.3", SCHEDULE,
        "blocks_beyond(s, num_hits, blocks_for(cfg, known), True) + free_hits",
        "blocks_beyond(s, num_hits, blocks_for(cfg, known), True)",
    ),
    Mutation(
        "the gate does not know the watermark", "2.3", SCHEDULE,
        "            return POOL_FULL_GATE, needed\n        if needed + watermark > now.free_blocks:",
        "            return POOL_FULL_GATE, needed\n        if needed > now.free_blocks:",
    ),
    Mutation(
        "hits that are free need no room", "2.4", SCHEDULE,
        "blocks_beyond(s, num_hits, blocks_for(cfg, tokens), False) + free_hits",
        "blocks_beyond(s, num_hits, blocks_for(cfg, tokens), False)",
    ),
    Mutation(
        "a request asks for a block ahead", "2.4", SCHEDULE,
        "    if tokens <= row.num_blocks * cfg.block_size:\n        return 0\n    return blocks_for(cfg, tokens)",
        "    if tokens < row.num_blocks * cfg.block_size:\n        return 0\n    return blocks_for(cfg, tokens + 1)",
    ),
    Mutation(
        "what an admission hits is put into the map again", "2.5", BLOCKS,
        "row.num_blocks = row.num_cached = num_hits",
        "row.num_blocks = num_hits",
    ),
    Mutation(
        "an admission's blocks are cached after the step", "2.6", SCHEDULE,
        "    cache_full(s, row, r, row.computed)\n    if not now.is_scattered",
        "    cache_full(s, row, r, hit)\n    if not now.is_scattered",
    ),
    Mutation(
        "a running request's blocks are cached after the step", "2.6", SCHEDULE,
        '    cache_full(s, row, r, row.computed)\n    return True\n\n\n@inline_njit\ndef blocks_with_room',
        '    cache_full(s, row, r, row.computed - n)\n    return True\n\n\n@inline_njit\ndef blocks_with_room',
    ),
    Mutation(
        "the threshold holds for a lonely request", "3.1", SCHEDULE,
        "if eligible > 1 else 0",
        "if eligible > 0 else 0",
    ),
    Mutation(
        "the adaptive threshold only counts who runs", "3.1", SCHEDULE,
        "now.budget // eligible",
        "now.budget // max(now.num_running, 1)",
    ),
    Mutation(
        "the cadence counts one step too many", "3.2", SCHEDULE,
        "now.executed + 1 - now.last_prefill < interval",
        "now.executed - now.last_prefill < interval",
    ),
    Mutation(
        "prefills are deferred though nobody decodes", "3.2", SCHEDULE,
        '        now.defer = r >= 0\n',
        '        now.defer = now.num_running > 0\n',
    ),
    Mutation(
        "prefills are deferred though somebody waited", "3.2", SCHEDULE,
        "interval > 1 and not now.cap_bound and",
        "interval > 1 and",
    ),
    Mutation(
        "a request is scheduled beyond its last token", "3.3", SCHEDULE,
        "row.computed + 2 - row.placeholders >= row.prompt + row.output",
        "row.computed + 1 - row.placeholders >= row.prompt + row.output",
    ),
    Mutation(
        "a chunk of a prompt goes on in a deferring step", "3.4", SCHEDULE,
        'if is_ending(row) or (now.defer and row.prefilling):',
        'if is_ending(row):',
    ),
    Mutation(
        "a chunk may end at the model's length", "3.5", SCHEDULE,
        'n = min(n, s.settings[0].max_model_len - row.computed - 1)',
        'n = min(n, s.settings[0].max_model_len - row.computed)',
    ),
    Mutation(
        "nobody runs after a request with nothing to compute", "3.5", SCHEDULE,
        '    if n == 0:\n        return True\n',
        '    if n == 0:\n        return False\n',
    ),
    Mutation(
        "the first of the running list is preempted", "3.6", SCHEDULE,
        '        return now.last_running\n',
        '        return now.first_running\n',
    ),
    Mutation(
        "among equal ranks the last one is preempted", "3.6", SCHEDULE,
        "row.priority == other.priority and row.arrival > other.arrival",
        "row.priority == other.priority and row.arrival >= other.arrival",
    ),
    Mutation(
        "the victim is who arrived last, whatever its priority", "3.6", SCHEDULE,
        "if row.priority > other.priority or (row.priority == other.priority and row.arrival > other.arrival):",
        "if row.arrival > other.arrival:",
    ),
    Mutation(
        "a victim's tokens are lost to the budget", "3.6", SCHEDULE,
        "    now.budget += n\n    now.num_scheduled",
        "    now.num_scheduled",
    ),
    Mutation(
        "a victim's tokens stay in the sums of the step", "3.6", SCHEDULE,
        "    add_to_sums(now, row, step[k], -1)\n",
        "",
    ),
    Mutation(
        "a victim before the one that asks makes it miss its turn", "3.6", SCHEDULE,
        '        r = req[r].after\n\n\n@inner_njit\ndef run_one',
        '        r = req[req[r].after].after if now.num_victims > 0 and req[r].after >= 0 else req[r].after\n\n\n@inner_njit\ndef run_one',
    ),
    Mutation(
        "several victims wait in the order in which they went", "3.7", SCHEDULE,
        '        s.seats[now.num_preempted].preempted = victim\n',
        '        for k in range(now.num_preempted, 0, -1):\n            s.seats[k].preempted = s.seats[k - 1].preempted\n        s.seats[0].preempted = victim\n',
    ),
    Mutation(
        "output in flight is fresh after a preemption", "3.7", SCHEDULE,
        "row.stale = row.in_flight",
        "row.stale = 0",
    ),
    Mutation(
        "who preempts itself ends the phase under priorities too", "3.8", SCHEDULE,
        '    return s.settings[0].policy == PRIORITY or ',
        '    return ',
    ),
    Mutation(
        "requests are admitted in a step with a preemption", "3.10", SCHEDULE,
        '        if now.num_victims == 0:\n            admit_waiting(s)',
        '        if True:\n            admit_waiting(s)',
    ),
    Mutation(
        "a prompt that is cached whole is not computed at all", "3.11", BLOCKS,
        "tokens = num_tokens - 1",
        "tokens = num_tokens",
    ),
    Mutation(
        "a deferring step admits nobody", "3.12", SCHEDULE,
        "return s.now[0].defer and hit < known_tokens(s.requests[r]) - 1",
        "return s.now[0].defer",
    ),
    Mutation(
        "an admission knows no threshold", "3.13", SCHEDULE,
        "return now.threshold if 0 < now.threshold < n else n",
        "return n",
    ),
    Mutation(
        "a prompt is cut although chunked prefill is off", "3.13", SCHEDULE,
        '(not s.settings[0].enable_chunked_prefill and n > now.budget)',
        'False',
    ),
    Mutation(
        "the cap on running requests is max_num_seqs alone", "3.14", RUN,
        "or_none(settings.max_num_active_seqs, settings.max_num_seqs)",
        "settings.max_num_seqs",
    ),
    Mutation(
        "who is admitted goes to the front of the running list", "3.15", SCHEDULE,
        '    enter_running(now, s.requests, r)\n',
        '    enter_running(now, s.requests, r)\n    if now.first_running != r:\n        unlink_running(now, s.requests, r)\n        now.num_running += 1\n        row.before, row.after = -1, now.first_running\n        s.requests[now.first_running].before = r\n        now.first_running = r\n',
    ),
    Mutation(
        "equal priorities are admitted latest first", "3.15", QUEUES,
        'return comes_first(req[a].arrival, a, req[b].arrival, b)',
        'return comes_first(req[b].arrival, b, req[a].arrival, a)',
    ),
    Mutation(
        "a deferring step notes who waits", "3.16", SCHEDULE,
        '            if not now.defer:\n                now.cap_bound',
        '            if True:\n                now.cap_bound',
    ),
    Mutation(
        "chunks of running prompts do not count for the cadence", "3.17", SCHEDULE,
        '    now.num_prefills += row.prefilling  # 3.17\n',
        '',
    ),
    Mutation(
        "a preempted chunk does not count for the cadence", "3.17", SCHEDULE,
        "    now.num_scheduled -= 1\n    now.held_tokens",
        "    now.num_prefills -= step[k].is_prefill\n    now.num_scheduled -= 1\n    now.held_tokens",
    ),
    Mutation(
        "every admission counts for the cadence", "3.17", SCHEDULE,
        "now.num_prefills += hit < known_tokens(row) - 1",
        "now.num_prefills += hit < known_tokens(row)",
    ),
    Mutation(
        "a request gets one token more than it asked for", "3.19", LOOP,
        'return row.generated >= row.output or',
        'return row.generated > row.output or',
    ),
    Mutation(
        "a request may be one token longer than the model", "3.19", LOOP,
        'or row.prompt + row.generated >= s.settings[0].max_model_len',
        'or row.prompt + row.generated > s.settings[0].max_model_len',
    ),
    Mutation(
        "requests that arrive as a step ends come a step late", "3.20", LOOP,
        'if not receive(s, now.t):',
        'if not receive(s, now.t - (now.num_running > 0)):',
    ),
    Mutation(
        "a prompt of the model's length is served", "3.21", LOOP,
        "if prompt >= cfg.max_model_len:",
        "if prompt > cfg.max_model_len:",
    ),
    Mutation(
        "output of the model's length is refused", "3.21", LOOP,
        "FRONTEND_OPENAI and output > cfg.max_model_len",
        "FRONTEND_OPENAI and output >= cfg.max_model_len",
    ),
    Mutation(
        "a request one block too long for the pool is served", "3.22", SCHEDULE,
        "and whole > cfg.num_gpu_blocks - 1",
        "and whole > cfg.num_gpu_blocks",
    ),
    Mutation(
        "a livelock is given up in its first round", "3.22", SCHEDULE,
        "now.lonely_rounds >= LIVELOCK_ROUNDS",
        "now.lonely_rounds >= 0",
    ),
    Mutation(
        "steps overlap on the device", "4.1", LOOP,
        "now.step_start = max(now.t, now.device_free)",
        "now.step_start = now.t",
    ),
    Mutation(
        "one step in flight instead of two", "4.1", LOOP,
        "now.awaiting = now.steps_in_flight == len(s.flights) or",
        "now.awaiting = now.steps_in_flight >= 1 or",
    ),
    Mutation(
        "a chunk of a prompt assumes a token too", "4.2", SCHEDULE,
        "row.placeholders += entry.emits",
        "row.placeholders += 1",
    ),
    Mutation(
        "a decode counts assumed tokens as known ones still to compute", "4.2", SCHEDULE,
        "entry.emits = row.computed == known_tokens(row) + row.placeholders",
        "entry.emits = row.computed == known_tokens(row)",
    ),
    Mutation(
        "a preempted request loses the token in flight", "4.3", LOOP,
        'if not entry.emits or row.status == ENDED:',
        'if not entry.emits or row.status == ENDED or is_stale:',
    ),
    Mutation(
        "stale output takes back an assumed token", "4.3", LOOP,
        'if s.settings[0].async_scheduling and not is_stale:',
        'if s.settings[0].async_scheduling:',
    ),
    Mutation(
        "tokens in flight are cached with the output before them", "4.3", LOOP,
        '        row.placeholders -= 1\n        cache_full(s, row, r, row.computed - row.in_flight)  # 4.3',
        '        row.placeholders -= 1\n        cache_full(s, row, r, row.computed)  # 4.3',
    ),
    Mutation(
        "generated blocks are not cached when their output comes", "4.3", LOOP,
        '        row.placeholders -= 1\n        cache_full(s, row, r, row.computed - row.in_flight)  # 4.3',
        '        row.placeholders -= 1',
    ),
    Mutation(
        "one empty step means that nothing changes any more", "4.5", LOOP,
        'idle_limit = 3 if cfg.async_scheduling else 1',
        'idle_limit = 1',
    ),
    Mutation(
        "a window's most blocks are those of one batch in flight", "4.6", STATE,
        "* (2 if settings.async_scheduling else 1)  # 4.6",
        "",
    ),
    Mutation(
        "a window is one token wider", "6.4", BLOCKS,
        "max(0, computed - group.window + 1)",
        "max(0, computed - group.window)",
    ),
    Mutation(
        "a window is one token narrower", "6.4", BLOCKS,
        "max(0, computed - group.window + 1)",
        "max(0, computed - group.window + 2)",
    ),
    Mutation(
        "the gate allows a window one block less", "6.4", STATE,
        "-(-min(window - 1 + in_flight, limit) // block) + 1",
        "-(-min(window - 1 + in_flight, limit) // block)",
    ),
    Mutation(
        "a running request keeps what its windows have left behind", "6.5", SCHEDULE,
        '    if now.has_windows:\n        free_skipped(s, row)\n    lacking',
        '    lacking',
    ),
    Mutation(
        "windows leave blocks behind before their output is there", "6.5", BLOCKS,
        'row.windows_at, row.computed - row.in_flight',
        'row.windows_at, row.computed',
    ),
    Mutation(
        "blocks are taken for the last group first", "6.6", BLOCKS,
        '    for group in range(len(groups)):\n        taken = blocks_to_take',
        '    for group in range(len(groups) - 1, -1, -1):\n        taken = blocks_to_take',
    ),
    Mutation(
        "a window caches the block of the last prompt token too", "6.7", BLOCKS,
        "return end - run <= k < end or",
        "return end - run <= k <= end or",
    ),
    Mutation(
        "a resumed request caches before all its known tokens", "6.7", BLOCKS,
        'end = full_blocks(cfg, row.prompt - 1)',
        'end = full_blocks(cfg, row.prompt + row.generated - 1)',
    ),
    Mutation(
        "a window does not cache at its junction", "6.7", BLOCKS,
        " or row.junction - run <= k < row.junction",
        "",
    ),
    Mutation(
        "windows are sparse whatever the retention interval", "6.7", BLOCKS,
        '    if cfg.cache_every_block:\n        return run > 0\n',
        '',
    ),
    Mutation(
        "a junction outlives the admission after it", "6.7", BLOCKS,
        "    row.junction = now.junction\n",
        "    row.junction = max(row.junction, now.junction)\n",
    ),
    Mutation(
        "a window wants one block more", "6.8", BLOCKS,
        "needed = s.groups[like].run_blocks",
        "needed = s.groups[like].run_blocks + 1",
    ),
    Mutation(
        "groups are looked up in one round only", "6.8", BLOCKS,
        "if is_one_round or tokens == before:",
        "if True:",
    ),
    Mutation(
        "groups are looked up in the order in which they are listed", "6.8", STATE,
        "key=lambda g: groups[g].kind != FULL",
        "key=lambda g: g",
    ),
    Mutation(
        "of equal groups only the first is asked", "6.8", BLOCKS,
        "    for group in range(like, len(groups)):\n        if is_alike(groups, group, like):\n            b = ",
        "    for group in range(like, like + 1):\n        if is_alike(groups, group, like):\n            b = ",
    ),
    Mutation(
        "a recurrent group keeps the states of all boundaries", "6.10", BLOCKS,
        "        return max(0, computed - 1)",
        "        return 0",
    ),
    Mutation(
        "a recurrent group takes a block for every place in its table", "6.10", BLOCKS,
        "        return min(count, 1)\n",
        "        return count\n",
    ),
    Mutation(
        "without prefix caching a recurrent group takes blocks as it grows", "6.10", BLOCKS,
        "        return 1 if num_blocks == 0 and count > 0 else 0",
        "        return min(count, 1)",
    ),
    Mutation(
        "prefills of recurrent layers end anywhere", "6.10", SCHEDULE,
        "        if aligned > start or block_size <= most:\n            end = aligned",
        "        if False:\n            end = aligned",
    ),
    Mutation(
        "a state that this very step caches can be hit", "6.10", BLOCKS,
        '            if s.pool.copies[b].cached_in == now.num_steps:',
        '            if False:',
    ),
    Mutation(
        "no prefill stops at the last boundary of a prompt", "6.10", SCHEDULE,
        "        (known_tokens(row) - 1) // block_size * block_size,\n",
        "        0,\n",
    ),
    Mutation(
        "no prefill stops at a junction", "6.10", SCHEDULE,
        "        start + (junction * block_size - start) // block_size * block_size\n        if junction * block_size < end\n        else 0,\n",
        "        0,\n",
    ),
    Mutation(
        "a window that keeps chunks begins a chunk late", "6.4", BLOCKS,
        "return computed // group.window * group.window",
        "return (computed - 1) // group.window * group.window",
    ),
    Mutation(
        "chunks that are not needed do not count as found", "6.8", BLOCKS,
        "    k = skipped_blocks(s, like, tokens)\n    forget",
        "    k = 0\n    forget",
    ),
    # What the cohort must keep of the rules, though it visits nobody.
    Mutation(
        "the cohort's tokens are free of charge", "3.9", SCHEDULE,
        "    now.budget -= n\n    now.ctx += member_tokens(now)",
        "    now.ctx += member_tokens(now)",
    ),
    Mutation(
        "the cohort runs whatever the budget", "3.9", SCHEDULE,
        "    if tokens > now.budget:\n        return ONE_BY_ONE\n",
        "",
    ),
    Mutation(
        "others between members count for nothing", "3.9", SCHEDULE,
        "            tokens += n\n",
        "            pass\n",
    ),
    Mutation(
        "with a step in flight members make room as without", "4.3", SCHEDULE,
        "if cfg.async_scheduling or cfg.policy == PRIORITY or now.window_groups > 0:",
        "if cfg.policy == PRIORITY or now.window_groups > 0:",
    ),
    Mutation(
        "by priority members make room as first come, first served", "3.6", SCHEDULE,
        "if cfg.async_scheduling or cfg.policy == PRIORITY or now.window_groups > 0:",
        "if cfg.async_scheduling or now.window_groups > 0:",
    ),
    Mutation(
        "members that need a block take it before the others between them", "1.2", SCHEDULE,
        "        if x < now.num_others and req[seats[x].other].stamp < req[r].stamp:",
        "        if False:",
    ),
    Mutation(
        "members are visited a step late", "2.4", COHORT,
        "    at = phase + now.due\n",
        "    at = phase + now.due + 1\n",
    ),
    Mutation(
        "a member joins behind those admitted after it", "1.2", COHORT,
        "    while before >= 0 and req[before].stamp > req[r].stamp:",
        "    while before >= 0 and False:",
    ),
    Mutation(
        "a member makes one token more", "3.19", COHORT,
        "if crossing < last else 2 * last\n",
        "if crossing < last else 2 * last + 2\n",
    ),
    Mutation(
        "of two members that end in one step one is forgotten", "3.19", COHORT,
        "    s.days[day] = before\n",
        "    s.days[day] = NOBODY\n",
    ),
    Mutation(
        "with a step in flight a window knows of the prompt at once", "4.1, 6.5", COHORT,
        "soonest = lag if row.first_token_at < 0 else 0",
        "soonest = 0",
    ),
    Mutation(
        "a member outgrows its window a step late", "6.5", COHORT,
        "max(soonest, now.window + lag - row.computed)",
        "max(soonest, now.window + lag - row.computed) + 1",
    ),
    Mutation(
        "in quiet steps everybody gets more context in the attention window", "step time", LOOP,
        "float(n - now.num_beyond)",
        "float(n)",
    ),
    Mutation(
        "beside an admission members have all their context in the attention window", "step time", LOOP,
        "    now.window_ctx = tokens_in_window(now)\n",
        "    now.window_ctx = member_tokens(now)\n",
    ),
    Mutation(
        "who waits for blocks is not looked at when windows free some", "3.14, 6.5", LOOP,
        "            if now.num_past > 0 and is_head_waiting_for_blocks(s):",
        "            if False:",
    ),
    Mutation(
        "members that end in one step end as they come", "3.19", COHORT,
        "        while k > 0 and req[seats[k - 1].ending].stamp > req[r].stamp:",
        "        while k > 0 and False:",
    ),
    Mutation(
        "a request joins although it missed a step", "3.19", COHORT,
        " or row.last_token_at != now.last_handout:",
        ":",
    ),
    Mutation(
        "a window's jump after the prefill is forgotten", "6.5", COHORT,
        "            is_joining = is_joining and was_steady\n",
        "",
    ),
    Mutation(
        "members in flight are not told from the others", "4.3", COHORT,
        "    list_members_in_flight(s)\n    r = now.first_running",
        "    r = now.first_running",
    ),
    Mutation(
        "quiet steps go on after a request was sent", "3.20", LOOP,
        "stop = min(min(next_send(s), next_expiry(s))",
        "stop = min(next_expiry(s)",
    ),
    Mutation(
        "quiet steps go on after a deadline", "3.22", LOOP,
        "stop = min(min(next_send(s), next_expiry(s))",
        "stop = min(next_send(s)",
    ),
    Mutation(
        "quiet steps do not look at the pool", "3.6", LOOP,
        "        if free < 0:\n            free += in_phase[at]\n",
        "        if False:\n            free += in_phase[at]\n",
    ),
    Mutation(
        "quiet steps in several groups do not look at the pool", "3.6", LOOP,
        "        if free < 0 or t + width > latest:\n",
        "        if t + width > latest:\n",
    ),
    Mutation(
        "quiet steps do not end with the bin", "", LOOP,
        "    stop = min(stop, latest + 1 - int(longest)) - now.t\n",
        "    stop -= now.t\n",
    ),
    Mutation(
        "who outgrows a window is not visited for it", "6.5", COHORT,
        "    return 1 if outgrown_at < NEVER and row.prompt + tokens_to_make(s, row) > outgrown_at else 0",
        "    return 0",
    ),
    Mutation(
        "a member that a window leaves behind takes its block a second time", "6.5", SCHEDULE,
        "        x = visit(s, is_growing)\n",
        "        x = visit(s, True)\n",
    ),
    Mutation(
        "who comes in a quiet step and who ends with it come in the wrong order", "3.20", LOOP,
        "            if not receive(s, now.t - 1) or",
        "            if",
    ),
    Mutation(
        "who comes in a quiet step waits from its end on", "3.20", LOOP,
        "    line.waiting_area += now.accounted - time\n",
        "",
    ),
    Mutation(
        "who comes while a quiet step runs waits until nothing is quiet", "3.14", LOOP,
        "            stop = now.t\n",
        "            stop = stop\n",
    ),
    Mutation(
        "the watermark is forgotten in a quiet admission", "2.3", LOOP,
        "free < cfg.watermark_blocks or not joins_at_once",
        "free < 0 or not joins_at_once",
    ),
    Mutation(
        "the cohort takes no budget from a quiet admission", "3.13", LOOP,
        "    budget = cfg.max_num_batched_tokens - now.num_members\n    growing",
        "    budget = cfg.max_num_batched_tokens\n    growing",
    ),
    Mutation(
        "a quiet admission does not say who still waits", "3.14", LOOP,
        "        note_wait(s)\n",
        "        pass\n",
    ),
    Mutation(
        "first tokens come before the ends of the same quiet step", "3.19", LOOP,
        "    if now.handed + 1 == now.decodes:\n        pop_ending(s)\n    now.handed",
        "    now.handed",
    ),
    Mutation(
        "who waits for blocks is not asked again when some are there", "3.14", SCHEDULE,
        "    if now.wait_cause != POOL_FULL_GATE or now.wait_least <= now.free_blocks:",
        "    if now.wait_cause != POOL_FULL_GATE:",
    ),
    Mutation(
        "who waits for a fresh state is taken to wait for blocks", "6.10", SCHEDULE,
        "    if len(s.groups) > 1 or now.has_windows:\n        return False\n",
        "",
    ),
    Mutation(
        "who waits for blocks does not notice what is cached meanwhile", "3.11", SCHEDULE,
        "    return has_most or s.keys.oldest",
        "    return True or s.keys.oldest",
    ),
    Mutation(
        "best fit takes the first piece that is long enough", ALLOCATORS, REGIONS,
        " == BUDDY or s.settings[0].allocator == BEST_FIT\n",
        " == BUDDY\n",
    ),
    Mutation(
        "of the shortest pieces the last one is taken", ALLOCATORS, REGIONS,
        "free[k].length < free[found].length):",
        "free[k].length <= free[found].length):",
    ),
    Mutation(
        "a free region is not joined with what is free behind it", ALLOCATORS, REGIONS,
        "        if k + 1 < now.num_free_regions and free[k + 1].start == start + size:\n",
        "        if False:\n",
    ),
    Mutation(
        "a free region is not joined with what is free before it", ALLOCATORS, REGIONS,
        "        if k > 0 and free[k - 1].start + free[k - 1].length == start:\n",
        "        if False:\n",
    ),
    Mutation(
        "the upper of two buddies is joined with what is behind it", ALLOCATORS, REGIONS,
        "        if free[k].start & free[k].length > 0:  # the upper half of a pair\n            k -= 1\n",
        "",
    ),
    Mutation(
        "the upper of two buddies grows in place", ALLOCATORS, REGIONS,
        "(piece.length == more and row.slot & more == 0)",
        "piece.length == more",
    ),
    Mutation(
        "a region goes where it can stay", ALLOCATORS, REGIONS,
        "    if can_grow_in_place(s, row, k, size):\n",
        "    if False:\n",
    ),
    Mutation(
        "a region that moves is free before it has its new place", ALLOCATORS, REGIONS,
        "        k = find_piece(s, size)\n        if k == now.num_free_regions:\n            return -1\n        start = take_from_piece(s, k, size)\n        free_piece(s, row.slot, row.num_blocks)\n",
        "        free_piece(s, row.slot, row.num_blocks)\n        k = find_piece(s, size)\n        if k == now.num_free_regions:\n            return -1\n        start = take_from_piece(s, k, size)\n",
    ),
    Mutation(
        "growth in place copies", ALLOCATORS, REGIONS,
        "    copied, kind = 0, REGION_GROW\n",
        "    copied, kind = row.computed, REGION_GROW\n",
    ),
    Mutation(
        "the last token of a request needs a place", ALLOCATORS, REGIONS,
        "cfg.max_model_len) - 1\n    return max(0",
        "cfg.max_model_len)\n    return max(0",
    ),
    Mutation(
        "a region that grows wastes what it wasted", ALLOCATORS, REGIONS,
        "    now.internal_tokens += unused_tokens(s, row, size) - unused_tokens(s, row, row.num_blocks)\n",
        "",
    ),
    Mutation(
        "contiguous reserves the prompt", ALLOCATORS, SCHEDULE,
        "        tokens = cfg.max_model_len\n    elif cfg.allocator == EXACT:",
        "        tokens = row.prompt\n    elif cfg.allocator == EXACT:",
    ),
    Mutation(
        "exact reserves a token less", ALLOCATORS, SCHEDULE,
        "        tokens = row.prompt + row.output\n    size = ",
        "        tokens = row.prompt + row.output - 1\n    size = ",
    ),
    Mutation(
        "exact reserves what the model cannot reach", ALLOCATORS, SCHEDULE,
        "    size = blocks_for(cfg, min(tokens, cfg.max_model_len))\n",
        "    size = blocks_for(cfg, tokens if cfg.allocator == EXACT else min(tokens, cfg.max_model_len))\n",
    ),
    Mutation(
        "a buddy grows by what it lacks", ALLOCATORS, SCHEDULE,
        "    if s.settings[0].allocator == BUDDY:\n        lacking = row.num_blocks\n",
        "",
    ),
    Mutation(
        "any free blocks make a region", ALLOCATORS, SCHEDULE,
        "        if whole > largest_free(s):\n            return POOL_FULL, whole\n",
        "        if whole > now.free_blocks:\n            return POOL_FULL, whole\n",
    ),
    Mutation(
        "regions know no watermark", ALLOCATORS, SCHEDULE,
        "        return POOL_FULL_WATERMARK if whole + watermark > now.free_blocks else NO_CAUSE, whole\n",
        "        return NO_CAUSE, whole\n",
    ),
    Mutation(
        "out of memory frees nothing", ALLOCATORS, SCHEDULE,
        "    free_before, lost = now.free_blocks, row.computed\n    release(s, r)\n    now.num_dropped",
        "    free_before, lost = now.free_blocks, row.computed\n    now.num_dropped",
    ),
    Mutation(
        "nobody runs after who is out of memory", ALLOCATORS, SCHEDULE,
        "== PRIORITY or s.settings[0].allocator != PAGED\n",
        "== PRIORITY\n",
    ),
    Mutation(
        "the largest piece is that after who is out of memory left", ALLOCATORS, SCHEDULE,
        "    log_region(s, r, REGION_SHORT, -1, largest_free(s))\n    free_before, lost = now.free_blocks, row.computed\n    release(s, r)\n",
        "    free_before, lost = now.free_blocks, row.computed\n    release(s, r)\n    log_region(s, r, REGION_SHORT, -1, largest_free(s))\n",
    ),
    Mutation(
        "who waits for a region looks again when enough is free in all", ALLOCATORS, SCHEDULE,
        "return now.wait_cause == POOL_FULL and now.wait_least > largest_free(s)",
        "return now.wait_cause == POOL_FULL",
    ),
    Mutation(
        "the cohort runs together though others may find no place", ALLOCATORS, SCHEDULE,
        "        return ONE_BY_ONE if blocks > blocks_to_grow(s) else TOGETHER\n",
        "        return TOGETHER\n",
    ),
    Mutation(
        "quiet steps go on over who may find no place", ALLOCATORS, LOOP,
        "                    if cfg.allocator != PAGED:  # who does not find a place to grow ends\n",
        "                    if False:\n",
    ),
    Mutation(
        "what is free is lost to fragments while the watermark holds", ALLOCATORS, BLOCKS,
        "    if s.settings[0].allocator != PAGED and now.wait_cause == POOL_FULL:\n",
        "    if s.settings[0].allocator != PAGED:\n",
    ),
    Mutation(
        "what is free is lost to fragments while nobody waits for memory", ALLOCATORS, BLOCKS,
        "    if not is_full or s.requests[now.wait_request].status == ENDED:\n        return\n",
        "    if s.requests[now.wait_request].status == ENDED:\n        return\n",
    ),
)  # fmt: skip
