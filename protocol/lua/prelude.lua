-- What every transition shares. Put in front of each script when it is loaded, after a table KEY with
-- the names of all keys. KEYS[1] only routes the call: with RQ_KEY_PREFIX='{rq}' all keys lie in one slot,
-- and a claim cannot know the ids it will pop, so names are built here, from KEY alone.

local HOUR, DAY = 3600, 86400
local HOUR_MS = 1000 * HOUR

-- The server's clock is the only one: hosts whose clocks disagree still agree on who is late.
local clock = redis.call('TIME')
local now_s = tonumber(clock[1])
local now_ms = now_s * 1000 + math.floor(tonumber(clock[2]) / 1000)

local cursor = 0
local function arg()
  cursor = cursor + 1
  return ARGV[cursor]
end

-- One command for many, sent when all members are known: a call of Redis costs a script as much as the work in it.
-- add(name, ...) collects members of the key `name`; send() runs the command once for each key (for DEL and the like,
-- which take only names, once).
local function batch(command)
  local names, members = {}, {}
  local calls = {}
  function calls.add(name, ...)
    if select('#', ...) == 0 then
      names[#names + 1] = name
      return
    end
    local list = members[name]
    if not list then
      list = {}
      members[name] = list
      names[#names + 1] = name
    end
    for _, value in ipairs({ ... }) do list[#list + 1] = value end
  end
  function calls.send()
    if #names == 0 then return end
    if next(members) == nil then
      redis.call(command, unpack(names))
    else
      for _, name in ipairs(names) do redis.call(command, name, unpack(members[name])) end
    end
    names, members = {}, {}
  end
  return calls
end

-- A number as text: '%d' and tostring() turn large numbers into floats or exponents.
local function int(number)
  return string.format('%.0f', number)
end

local now_text = int(now_ms)

-- Seconds since 1970, with microseconds, as RQ stores them in executions and results.
local stamp = string.format('%.0f.%06d', now_s, tonumber(clock[2]))
local function timestamp()
  return stamp
end

-- The same for a moment that stands somewhere as ms; nil for what is none.
local function seconds_of(ms)
  local number = tonumber(ms or '')
  return number and string.format('%.6f', number / 1000) or nil
end

-- The date as RQ's utcformat writes it, made once. Days to civil date: Howard Hinnant's algorithm (no os.date here).
local date
local function utc()
  if date then return date end
  local days = math.floor(now_s / DAY)
  local rest = now_s - days * DAY
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  date = string.format('%04d-%02d-%02dT%02d:%02d:%02d.%06dZ', year, month, day, math.floor(rest / 3600),
    math.floor(rest % 3600 / 60), rest % 60, tonumber(clock[2]))
  return date
end

-- At maxmemory Redis refuses what needs memory only until a script has written: this write needs none. What ends,
-- renews or hands on a request begins with it (see scripts.py), while new requests and checkpoints give way.
local function never_refused()
  redis.call('DEL', KEY.schema .. ':none')
end

-- A number that stands in Redis; `other` (or 0) for what is none: somebody else may have written it, and a script
-- that stops halfway leaves halfway.
local function number_of(text, other)
  local number = tonumber(text or '')
  if number and number >= -9007199254740992 and number <= 9007199254740992 then return math.floor(number) end
  return other or 0
end

-- HINCRBY; what is no number counts as 0.
local function add(name, field, by)
  local sum = redis.pcall('HINCRBY', name, field, by)
  if type(sum) ~= 'table' then return sum end
  redis.call('HSET', name, field, by)
  return by
end

local function count(event, queue, by)
  add(KEY.counters, event .. ':' .. queue, by or 1)
end

-- What became of an execution that ended without an end of its request, for whoever goes on: see records.Interruption.
-- It was last seen to move at its last checkpoint, or at its claim. taken: '1' if its worker has not ended it itself.
local function interrupt(id, execution, worker, kind, claimed_ms, taken)
  local moved = math.max(claimed_ms, number_of(redis.call('HGET', KEY.checkpoint .. id, 'at')))
  redis.call('HSET', KEY.job .. id, 'interrupted',
    table.concat({ kind, int(moved), int(now_ms), int(claimed_ms), taken or '0', execution, worker }, ' '))
end

-- What ends an execution is told with what is known of it: `claimed:seq:at`, the ms of its claim, and number and ms of
-- the checkpoint that it leaves. Nobody else keeps the times of earlier executions.
local ENDS = { redelivered = true, retry = true, released = true, failed = true, canceled = true, stopped = true, finished = true }

local function course(id)
  local claimed = redis.call('HGET', KEY.job .. id, 'claimed')
  local point = redis.call('HMGET', KEY.checkpoint .. id, 'seq', 'at')
  return table.concat({ int(number_of(claimed)), int(number_of(point[1])), int(number_of(point[2])) }, ':')
end

-- One line of a request's history: tab-separated, so that redis-cli shows it as it is. Two more columns stand behind the
-- reason if there is something in them: the course of an execution that ended, and what the dead left behind (stacks).
-- A reader of an older release takes them for a part of the reason. at: ms, if it was not just now.
local function history(id, event, worker, execution, offset, kind, reason, evidence, at)
  local plain = string.gsub(string.sub(reason or '', 1, 500), '[\t\r\n]', ' ')
  local name = KEY.history .. id
  local line = { at or now_text, event, worker or '', execution or '', offset or '0', kind or '', plain }
  if ENDS[event] and line[4] ~= '' then line[8] = course(id) end
  if (evidence or '') ~= '' then
    line[8] = line[8] or ''
    line[9] = evidence
  end
  redis.call('RPUSH', name, table.concat(line, '\t'))
  redis.call('LTRIM', name, -200, -1)
  redis.call('EXPIRE', name, DAY)
end

-- Wake one idle worker. Harmless to lose: an idle worker claims every second in any case. A bell that has rung eight times
-- unheard need not ring again: nobody is idle.
local function ring(queue)
  local name = KEY.bell .. queue
  local rung = redis.call('LLEN', name)
  if rung >= 8 then return end
  redis.call('LPUSH', name, '1')
  if rung == 0 then redis.call('EXPIRE', name, 60) end
end

-- Tell the producer that something is to be read. Only a hint: the truth stands in the keys.
local function hint(client, id, what)
  if client and client ~= '' then redis.call('PUBLISH', KEY.replies .. client, id .. ' ' .. what) end
end

-- Whether the caller's protocol is the newest that has written here; from now on it is, if it is newer. So the
-- first worker or producer of a newer protocol stops all that speak an older one.
local function speaks(schema)
  local newest = number_of(redis.call('GET', KEY.schema), -1)
  if newest > tonumber(schema) then return false end
  if newest < tonumber(schema) then redis.call('SET', KEY.schema, schema) end
  return true
end

-- Whether an incarnation was declared dead. It then holds nothing and may claim nothing.
local function reaped(incarnation)
  return redis.call('HEXISTS', KEY.incarnation .. incarnation, 'reaped') == 1
end

-- Whether the pool has too few workers. Whoever says so says until when: nobody need take it back.
local function degraded()
  local mode = redis.call('HMGET', KEY.mode, 'mode', 'until')
  return mode[1] == 'degraded' and now_ms < number_of(mode[2])
end

-- A worker that leaves in order is no loss, from the moment that it is told to. Only one that has been ready for a heartbeat
-- timeout can have been counted among the peaks (recovery/degradation.py); the next declaration must have seen that there
-- are fewer.
local function expect_one_less(incarnation, timeout_ms)
  local record = KEY.incarnation .. incarnation
  if redis.call('HSETNX', record, 'leaving_at', int(now_ms)) == 0 then return end
  local ready_at = number_of(redis.call('HGET', record, 'ready_at'))
  local peaks = redis.call('HGET', KEY.mode, 'peaks')
  if ready_at == 0 or now_ms - ready_at < timeout_ms or not peaks then return end
  local fewer = string.gsub(peaks, '(%d+):(%d+)', function(span, number)
    return span .. ':' .. int(math.max(0, number_of(number) - 1))
  end)
  redis.call('HSET', KEY.mode, 'peaks', fewer)
  add(KEY.mode, 'version', 1)
end

-- How long a lease lasts (ms): one and a half times the request's own step timeout (step_ms of its hash), else
-- what the worker says, which knows the task's.
local function lease_length(step_ms, lease_ms)
  return step_ms and 1.5 * number_of(step_ms, lease_ms / 1.5) or lease_ms
end

-- A plain job is one step of up to its timeout (s); with timeout -1 only the heartbeat watches it. In ms.
local function plain_lease(timeout)
  return timeout > 0 and timeout * 1000 + 30000 or 10 * 365 * DAY * 1000
end

-- A worker's queues stand in one text with commas between: a comma of a name is %2C there, and a percent sign %25.
local function listed(queue)
  return (string.gsub(queue, '[%%,]', { ['%'] = '%25', [','] = '%2C' }))
end

local function unlisted(text)
  return (string.gsub(text, '%%2[5C]', { ['%25'] = '%', ['%2C'] = ',' }))
end

-- The queues that a worker serves by one name (keys.served), and the name by which one of a priority may be served.
local function served(queue)
  if string.find(queue, '%-high$') or string.find(queue, '%-low$') then return { queue } end
  return { queue, queue .. '-high', queue .. '-low' }
end

local function without_priority(queue)
  return string.match(queue, '^(.*)%-high$') or string.match(queue, '^(.*)%-low$') or queue
end

-- RQ shows a worker as busy while it holds something. HSET must not bring back a deleted worker.
local function show_state(worker, incarnation)
  if worker == '' or redis.call('EXISTS', KEY.worker .. worker) == 0 then return end
  local busy = redis.call('EXISTS', KEY.held .. incarnation) == 1
  redis.call('HSET', KEY.worker .. worker, 'state', busy and 'busy' or 'idle')
end

-- Whether a request, or a plain job, runs. This is the only source of that: its hash names an execution, and the index of
-- the holder has the same one. A hash alone may be what a claim left that stopped halfway; an entry of the index alone is
-- of an id that was deleted, and perhaps used again. `leases` holds times only.
local function runs(id, execution, holder)
  return (execution or '') ~= '' and redis.call('HGET', KEY.held .. (holder or ''), id) == execution
end

-- Whether another job than the one that was claimed last has been saved over a hash whose started_at is empty: RQ's `enqueue`
-- with an id that is there saves a new one, which has not begun and was created at another date. entered: dates of the last
-- coming into the queue that a claim, or an end, has seen, and of the creation. Without it, nobody has put it there but its
-- submit; such a request has the timeout -1, and a new job mostly has not. Somebody who saves an old copy of a job
-- (`job.meta[…] = …; job.save()`) empties started_at as well, and makes no other job of it.
local function saved_over(entered, created_at, timeout)
  if entered then return created_at ~= string.match(entered, ' (.*)$') end
  return (timeout or '-1') ~= '-1'
end

-- Whether somebody has enqueued this id since its last claim: 'same' for the same job once more (`enqueue_job`),
-- 'new' if RQ's `enqueue` saved another job over it, which has not begun. RQ dates each entry into a queue. A date that
-- the last claim has seen, or that of the submit, was only written back by somebody with an old copy of the job. Dates
-- are compared for being the same, not by time: they come from the clocks of many producers.
local function enqueued_again(job)
  if job.started_at == '' and saved_over(job.entered, job.created_at, job.timeout) then return 'new' end
  local date, seen = job.enqueued_at or '', job.entered and string.match(job.entered, '^(.*) ')
  return date ~= '' and date ~= (seen or job.created_at) and date ~= job.created_at and 'same' or nil
end

-- What enqueued_again() looks at, and the status.
local function read_dates(id)
  local names, job = { 'status', 'started_at', 'enqueued_at', 'created_at', 'entered', 'timeout' }, {}
  for i, value in ipairs(redis.call('HMGET', KEY.job .. id, unpack(names))) do job[names[i]] = value or nil end
  return job
end

-- Whether the caller's execution is the current one of this job, and not of one that another was saved over.
local function owns(id, execution, current, started_at)
  if execution == '' or current ~= execution then return false end
  if started_at ~= '' then return true end
  local job = redis.call('HMGET', KEY.job .. id, 'entered', 'created_at', 'timeout')
  return not saved_over(job[1], job[2], job[3] or nil)
end

-- The holder's index forgets this execution; a newer one of the same request stays.
local function unhold(id, execution, incarnation)
  if redis.call('HGET', KEY.held .. incarnation, id) == execution then redis.call('HDEL', KEY.held .. incarnation, id) end
end

-- End a holding: lease, holder's index, and all of RQ's traces of the execution.
local function detach(queue, id, execution, incarnation, worker)
  local composite = id .. ':' .. execution
  redis.call('ZREM', KEY.leases .. queue, id)
  unhold(id, execution, incarnation)
  redis.call('ZREM', KEY.wip .. queue, composite)
  redis.call('DEL', KEY.execution .. composite)
  redis.call('ZREM', KEY.executions .. id, execution)
  redis.call('SREM', KEY.worker .. worker .. ':executions', composite)
end

-- RQ's record of an execution and what leads to it, for its viewers and its stop commands, once and if it is missing.
-- since: ms of the claim. It lives for an hour, renewed by heartbeats, so that RQ's own clean-up is a dead man's switch.
local function show_execution(id, execution, worker, since)
  local composite = id .. ':' .. execution
  local name = KEY.execution .. composite
  if redis.call('EXISTS', name) == 1 then return end
  redis.call('HSET', name, 'id', execution, 'job_id', id, 'created_at', seconds_of(since) or timestamp(),
    'last_heartbeat', timestamp(), 'worker_name', worker)
  redis.call('EXPIRE', name, HOUR + 60)
  redis.call('ZADD', KEY.executions .. id, int(now_s + HOUR + 60), execution)
  redis.call('EXPIRE', KEY.executions .. id, HOUR + 60)
  redis.call('SADD', KEY.worker .. worker .. ':executions', composite)
  redis.call('EXPIRE', KEY.worker .. worker .. ':executions', HOUR + 60)
end

-- A state above 1 MiB stands in chunks of its own. Two marks in the checkpoint, each `<execution>:<seq>:<chunks>`,
-- say which: `chunks` those that are committed, `writing` those that are being written. With their help whatever
-- drops a checkpoint drops all of its keys; what a crash leaves besides has a TTL.
local function chunk_name(id, seq, number)
  return KEY.chunk .. id .. ':' .. seq .. ':' .. int(number)
end

-- Delete the chunks that a mark names, but for one, `but` of the checkpoint `seq`.
local function drop_chunks(id, mark, seq, but)
  local old, chunks = string.match(mark or '', ':(%d+):(%d+)$')
  for number = 1, math.min(number_of(chunks), 65536) do
    if old ~= seq or number ~= tonumber(but) then redis.call('UNLINK', chunk_name(id, old, number)) end
  end
end

-- Before the hash goes, which has the marks.
local function drop_all_chunks(id)
  local marks = redis.call('HMGET', KEY.checkpoint .. id, 'chunks', 'writing')
  drop_chunks(id, marks[1])
  drop_chunks(id, marks[2])
end

-- Whether all chunks of a state are there, with so many bytes in all. Redis may have lost or evicted some.
local function chunks_there(id, execution, seq, chunks, length)
  local name, bytes = KEY.checkpoint .. id, 0
  if redis.call('HGET', name, 'writing') ~= table.concat({ execution, seq, chunks }, ':') then return false end
  for number = 1, tonumber(chunks) do bytes = bytes + redis.call('STRLEN', chunk_name(id, seq, number)) end
  return bytes == tonumber(length)
end

-- Forget what belongs to a request whose job hash is gone (Job.delete, Queue.empty, expiry). Does nothing while there is one:
-- the id may have been used again.
local function forget(id)
  if redis.call('HEXISTS', KEY.job .. id, 'created_at') == 1 then return end
  drop_all_chunks(id)
  redis.call('DEL', KEY.output .. id, KEY.checkpoint .. id, KEY.history .. id)
  redis.call('ZREM', KEY.checkpoints, id)
end

-- What is left of an execution that is not the current one any more, or never was: all of it goes but the lease, which may
-- be its successor's. RQ's clean-up would take its record for an abandoned job, and fail the one that has the id now.
-- queue: nil if the hash is gone; then there is no successor, and the lease goes too, in whichever of the worker's queues.
local function void(id, execution, incarnation, queue)
  forget(id)
  unhold(id, execution, incarnation)
  local composite = id .. ':' .. execution
  redis.call('ZREM', KEY.executions .. id, execution)
  redis.call('DEL', KEY.execution .. composite)
  if queue then
    redis.call('ZREM', KEY.wip .. queue, composite)
    return
  end
  local looked = 0
  for text in string.gmatch(redis.call('HGET', KEY.incarnation .. incarnation, 'queues') or '', '[^,]+') do
    local name = unlisted(text)
    if looked >= 64 then break end -- in others the sweep finds it, once it has run out
    looked = looked + 1
    for _, one in ipairs(served(name)) do
      redis.call('ZREM', KEY.wip .. one, composite)
      redis.call('ZREM', KEY.leases .. one, id)
    end
  end
end

-- A write by an execution that is not the current one is refused. queue: as the hash has it, nil without a hash.
local function refuse(id, execution, incarnation, queue)
  void(id, execution, incarnation, queue)
  count('fenced', queue or '')
  return 'lost'
end

-- What a living request has written does not expire while it runs, however long that takes.
local function refresh(id)
  for _, name in ipairs({ KEY.checkpoint, KEY.output, KEY.history }) do redis.call('EXPIRE', name .. id, DAY) end
  local seq, chunks = string.match(redis.call('HGET', KEY.checkpoint .. id, 'chunks') or '', ':(%d+):(%d+)$')
  -- Not at every checkpoint: there may be many, and they live for a day.
  if not seq or redis.call('TTL', chunk_name(id, seq, 1)) > DAY - HOUR then return end
  for number = 1, math.min(number_of(chunks), 65536) do redis.call('EXPIRE', chunk_name(id, seq, number), DAY) end
end

local function drop_checkpoint(id)
  drop_all_chunks(id)
  redis.call('DEL', KEY.checkpoint .. id)
  redis.call('ZREM', KEY.checkpoints, id)
end

-- A request starts from zero: a new epoch, so that a reader knows the old outputs from the new ones.
local function restart(id, reason, execution)
  local name = KEY.job .. id
  local offset = redis.call('HGET', KEY.checkpoint .. id, 'offset')
  local had = offset or redis.call('EXISTS', KEY.output .. id) == 1
  redis.call('DEL', KEY.output .. id)
  drop_checkpoint(id)
  if not had then return end
  redis.call('HDEL', name, 'best_offset', 'best_seq')
  add(name, 'epoch', 1)
  history(id, 'restart', '', execution or '', offset or '0', '', reason)
  count('restarts', redis.call('HGET', name, 'origin') or '')
end

-- Jobs may wait for this one, or for its slot under a rate limit: noted for whichever worker looks next, who
-- reads its status then and does what RQ's own code does. Returns whether it was noted.
local function note_waited_for(id)
  local name = KEY.job .. id
  if redis.call('EXISTS', name .. ':dependents') == 0 and redis.call('HEXISTS', name, 'rate_limit_key') == 0 then return false end
  redis.call('SADD', KEY.parents, id)
  redis.call('EXPIRE', KEY.parents, 7 * DAY)
  return true
end

local CALLBACKS = { finished = 'success_callback_name', failed = 'failure_callback_name', retried = 'failure_callback_name',
  stopped = 'stopped_callback_name' }

-- Webhooks and callbacks of RQ's that an end calls for: noted for a worker, one note for each end. A note is what
-- `last` holds, and the id. Returns whether it was noted.
local function note_to_tell(id, last)
  local field = CALLBACKS[string.match(last, ':(%a+)$')]
  if not field then return false end
  -- RQ writes '' for a callback that nobody has asked for.
  local asked = redis.call('HMGET', KEY.job .. id, field, 'webhooks')
  if (asked[1] or '') == '' and (asked[2] or '') == '' then return false end
  redis.call('SADD', KEY.notices, last .. ':' .. id)
  redis.call('EXPIRE', KEY.notices, 7 * DAY)
  return true
end

-- A TTL in seconds; RQ's -1 keeps the key for ever.
local function expire(name, ttl)
  if ttl < 0 then
    redis.call('PERSIST', name)
  else
    redis.call('EXPIRE', name, ttl)
  end
end

-- For so long (s) a producer may send a submit again whose answer was lost.
local RESENT = 600

-- A request that is kept for less than that after its end: its submit is remembered, so that it is not accepted twice.
local function remember(id, ttl)
  if ttl < 0 or ttl >= RESENT then return end
  local nonce = redis.call('HGET', KEY.job .. id, 'nonce') or ''
  if nonce ~= '' then redis.call('SET', KEY.spent .. id, nonce, 'EX', RESENT) end
end

-- After the end, everything of a request shares one TTL.
local function share_ttl(id, ttl)
  remember(id, ttl)
  local waited_for = note_waited_for(id)
  local told = note_to_tell(id, redis.call('HGET', KEY.job .. id, 'last') or '')
  -- Whoever acts upon a note still finds the job.
  if (waited_for or told) and ttl >= 0 then
    ttl = math.max(ttl, 60)
    redis.call('EXPIRE', KEY.job .. id .. ':dependents', ttl)
  end
  for _, name in ipairs({ KEY.job, KEY.output, KEY.history, KEY.results }) do expire(name .. id, ttl) end
end

-- The score of an ended request in RQ's registries: when it may leave them; RQ writes a negative TTL as it is.
local function leaves_at(ttl)
  return int(ttl < 0 and ttl or now_s + ttl)
end

-- One entry of RQ's result stream. kind: 1 finished, 2 failed (rq.results.Result.Type).
local function add_result(id, kind, worker, execution, started, field, value)
  local entry = { 'type', kind, 'worker_name', worker }
  if value ~= '' then
    entry[#entry + 1] = field
    entry[#entry + 1] = value
  end
  if execution ~= '' then
    for _, item in ipairs({ 'execution_id', execution, 'execution_started_at', started or timestamp(),
      'execution_ended_at', timestamp() }) do
      entry[#entry + 1] = item
    end
  end
  redis.call('XADD', KEY.results .. id, 'MAXLEN', 10, '*', unpack(entry))
end

-- The id stands in at most one of RQ's registries. Returns whether it waited in a set, and not in its queue's list.
local function leave_registries(queue, id)
  for _, name in ipairs({ KEY.finished, KEY.failed, KEY.canceled }) do redis.call('ZREM', name .. queue, id) end
  redis.call('ZREM', KEY.deadlines .. queue, id)
  local aside = 0
  for _, name in ipairs({ KEY.scheduled, KEY.deferred, KEY.retries, KEY.suspects }) do
    aside = aside + redis.call('ZREM', name .. queue, id)
  end
  redis.call('SREM', KEY.bounced .. queue, id)
  return aside > 0
end

-- A request ends while it waits. Its entry in the queue's list stays, since taking it out would be O(n): it is noted, so that
-- the claim that meets it knows it for what it is, and nobody counts it as waiting. aside: it stood in a set instead.
local function end_waiting(queue, id, aside)
  local job = read_dates(id)
  -- One that was enqueued again while it ran has the status of that run's end.
  if not aside and (job.status == 'queued' or enqueued_again(job)) then
    redis.call('ZADD', KEY.ended .. queue, now_text, id)
    redis.call('EXPIRE', KEY.ended .. queue, 7 * DAY)
  end
  -- RQ's requeue empties it, as does another job that RQ saves over this one (see enqueued_again).
  if job.started_at == '' then redis.call('HDEL', KEY.job .. id, 'started_at') end
  -- This coming into the queue is over, as after a claim.
  redis.call('HSET', KEY.job .. id, 'entered', (job.enqueued_at or '') .. ' ' .. (job.created_at or ''))
end

-- While a request waits, a sweep must find it when its deadline passes. Running, its own writes meet it.
local function watch_deadline(queue, id)
  local due = redis.call('HMGET', KEY.job .. id, 'deadline', 'queue_deadline')
  local deadline, first = number_of(due[1]), number_of(due[2])
  if first > 0 and (deadline == 0 or first < deadline) then deadline = first end
  if deadline > 0 then redis.call('ZADD', KEY.deadlines .. queue, int(deadline), id) end
end

-- Seconds before retry number n (1 is the first): base * 2^(n-1), at most cap, then spread over its last
-- quarter so that requests which failed together do not come back together. The spread is a hash of
-- request and number, not a random: the schedule of a request can be computed again.
local function backoff(id, n, base, cap)
  local delay = math.min(cap, base * 2 ^ math.min(n - 1, 30))
  local text, hash = id .. ':' .. int(n), 0
  -- Not redis.sha1hex, which fakeredis lacks. Every product stays below 2^53 and so exact; three rounds more
  -- carry the last characters, in which neighbours differ, into the high bits.
  for i = 1, #text + 3 do
    hash = ((hash + (string.byte(text, i) or 0)) * 1664525 + 1013904223) % 4294967296
  end
  return delay * (1 - 0.25 * hash / 4294967296)
end

-- A suspect waits in a set of its own until a worker can give it limited company.
local function to_suspects(queue, id)
  redis.call('ZADD', KEY.suspects .. queue, 'NX', int(now_ms), id)
  ring(queue)
end

-- Make a request suspect, one of `flight` that were in flight when their worker crashed or hung: from now on it shares
-- a worker with so few others that half of them are out of the question with the next crash.
local function suspect(id, execution, worker, flight, offset, kind)
  local name = KEY.job .. id
  local company = math.max(1, math.floor(flight / 2))
  redis.call('HSET', name, 'company', int(company))
  history(id, 'suspected', worker, execution, offset, kind, 'one of ' .. int(flight) .. ' in flight; it now runs with at most '
    .. int(company - 1) .. ' others')
  count('suspected', redis.call('HGET', name, 'origin') or '')
end

-- Where a request runs: the worker's name, and its device where the host may have several. Somebody may have given
-- the name, then it survives a restart; the device does in any case. Tab-separated.
local function where(incarnation, worker)
  local record = redis.call('HMGET', KEY.incarnation .. incarnation, 'host', 'device')
  local device = record[2] or ''
  local place = string.find(device, '%d') and (record[1] or '') .. '/' .. device or ''
  return (string.gsub(worker, '%c', ' ')) .. '\t' .. (string.gsub(place, '%c', ' '))
end

-- Whether a request failed there before; failed_on: one place a line.
local function failed_there(failed_on, place)
  local worker, device = string.match(place, '^(.*)\t(.*)$')
  for line in string.gmatch(failed_on, '[^\n]+') do
    local other, its_device = string.match(line, '^(.*)\t(.*)$')
    if (worker ~= '' and other == worker) or (device ~= '' and its_device == device) then return true end
  end
  return false
end

local BLAMED = { CRASH = true, HANG = true, GPU_ERROR = true, GPU_OOM = true, HOST_OOM = true, WORKER_LOST = true }

-- A request remembers the last four places at which it failed by what may be their fault; claim.lua prefers others.
local function blame(id, worker, incarnation)
  local kept = { where(incarnation, worker) }
  for line in string.gmatch(redis.call('HGET', KEY.job .. id, 'failed_on') or '', '[^\n]+') do
    if line ~= kept[1] and #kept < 4 then kept[#kept + 1] = line end
  end
  redis.call('HSET', KEY.job .. id, 'failed_on', table.concat(kept, '\n'))
end

-- A suspect that has stepped for a while is none any more. With the last of them, its worker takes ordinary requests
-- again.
local function clear(id, queue, execution, incarnation, worker, offset)
  redis.call('HDEL', KEY.job .. id, 'company')
  history(id, 'cleared', worker, execution, offset, '', 'it has moved again')
  for _, other in ipairs(redis.call('HKEYS', KEY.held .. incarnation)) do
    if redis.call('HEXISTS', KEY.job .. other, 'company') == 1 then return end
  end
  redis.call('ZREM', KEY.isolating, incarnation)
  ring(queue)
end

-- Whether a living worker that serves a queue, by its name or as a priority of another one, has shown a fingerprint.
local function shown(queue, fingerprint, alive_ms)
  for _, name in ipairs({ queue, without_priority(queue) }) do
    local member = name .. ' ' .. fingerprint
    local seen = redis.call('ZSCORE', KEY.fingerprints, member)
    if seen and tonumber(seen) > now_ms then
      redis.call('ZADD', KEY.fingerprints, now_text, member) -- the server's clock was set back
      return true
    end
    if seen and now_ms - tonumber(seen) <= alive_ms then return true end
  end
  return false
end

-- Back to the queue at once. At the front: it has waited its turn already.
local function to_front(queue, id)
  redis.call('HSET', KEY.job .. id, 'status', 'queued', 'enqueued_at', utc())
  if redis.call('HEXISTS', KEY.job .. id, 'company') == 1 then
    to_suspects(queue, id)
  else
    redis.call('LPUSH', KEY.queue .. queue, id)
  end
  watch_deadline(queue, id)
  ring(queue)
end

-- To wait for a due time. In our own set: RQ's scheduler would move it in two steps, and lose it between them.
local function to_retries(queue, id, delay)
  redis.call('HSET', KEY.job .. id, 'status', 'scheduled', 'aside_at', now_text)
  redis.call('ZADD', KEY.retries .. queue, int(now_ms + delay * 1000), id)
  watch_deadline(queue, id)
  note_waited_for(id) -- as in RQ, a slot under a rate limit is for what is queued or runs
end

-- To the back of its queue; under a rate limit of RQ's, it first has to get a slot again. Registered as RQ's
-- `enqueue` does, so that RQ's own code too gives it the next one that is free.
local function to_back(queue, id)
  local limit = redis.call('HMGET', KEY.job .. id, 'rate_limit_key', 'rate_limit_concurrency')
  if limit[1] and limit[2] then
    redis.call('SADD', KEY.limited, limit[1])
    redis.call('HSET', KEY.limit .. limit[1], 'concurrency', limit[2])
    redis.call('ZADD', KEY.limit .. limit[1] .. ':rate_limited', timestamp(), id)
    redis.call('HSET', KEY.job .. id, 'status', 'rate_limited')
    note_waited_for(id)
  else
    redis.call('HSET', KEY.job .. id, 'status', 'queued', 'enqueued_at', utc())
    if redis.call('HEXISTS', KEY.job .. id, 'company') == 1 then
      to_suspects(queue, id)
    else
      redis.call('RPUSH', KEY.queue .. queue, id)
    end
  end
end

-- RQ's whole shape of a failure, so that `rq requeue` and every viewer work.
local function bury(queue, id, execution, worker, started, kind, reason, exception, evidence)
  local name = KEY.job .. id
  local job = redis.call('HMGET', name, 'failure_ttl', 'client')
  local ttl = number_of(job[1], 7 * DAY)
  local aside = leave_registries(queue, id)
  if execution == '' then end_waiting(queue, id, aside) end
  redis.call('HSET', name, 'status', 'failed', 'ended_at', utc(), 'execution', '', 'last', (execution ~= '' and execution or '-') .. ':failed',
    'error_kind', kind, 'error_reason', reason)
  redis.call('ZADD', KEY.failed .. queue, leaves_at(ttl), id)
  add_result(id, '2', worker, execution, started, 'exc_string', exception)
  history(id, 'failed', worker, execution, redis.call('HGET', KEY.checkpoint .. id, 'offset') or '0', kind, reason, evidence)
  share_ttl(id, ttl)
  count('failed', queue)
  count('dead:' .. queue, kind)
  if worker ~= '' and redis.call('EXISTS', KEY.worker .. worker) == 1 then
    add(KEY.worker .. worker, 'failed_job_count', 1)
  end
  hint(job[2], id, 'end')
end

-- A deadline that was given in seconds counts from `counted_from`. If that lies ahead, the server's clock was set back
-- since, and the deadline goes back by as much. One that was given as a date stays what it is.
local function set_deadlines_back(id, counted_from)
  local ahead = number_of(counted_from) - now_ms
  if ahead <= 0 then return false end
  local name = KEY.job .. id
  local due = redis.call('HMGET', name, 'deadline', 'queue_deadline', 'dated')
  if due[1] and not due[3] then redis.call('HSET', name, 'deadline', int(number_of(due[1]) - ahead)) end
  if due[2] then redis.call('HSET', name, 'queue_deadline', int(number_of(due[2]) - ahead)) end
  redis.call('HSET', name, 'counted_from', now_text)
  return true
end

-- Why a waiting request has missed its time; nil if it has not.
local function late(id)
  set_deadlines_back(id, redis.call('HGET', KEY.job .. id, 'counted_from'))
  local due = redis.call('HMGET', KEY.job .. id, 'deadline', 'queue_deadline')
  if due[1] and number_of(due[1], now_ms + 1) <= now_ms then return 'its deadline passed while it waited' end
  if due[2] and number_of(due[2], now_ms + 1) <= now_ms then return 'no worker took it within its queue_timeout' end
end

-- End a held request whose deadline (as its hash has it) has passed. Returns whether it was so.
local function end_running(queue, id, execution, incarnation, deadline, counted_from)
  if counted_from and set_deadlines_back(id, counted_from) then deadline = redis.call('HGET', KEY.job .. id, 'deadline') end
  if not deadline or number_of(deadline, now_ms + 1) > now_ms then return false end
  local worker = redis.call('HGET', KEY.job .. id, 'worker_name') or ''
  local started = seconds_of(redis.call('HGET', KEY.job .. id, 'claimed'))
  detach(queue, id, execution, incarnation, worker)
  bury(queue, id, execution, worker, started, 'DEADLINE', 'its deadline passed while it ran', LATE)
  show_state(worker, incarnation)
  return true
end

-- End what waits past its deadline. The id stays in its queue's list; the claim that pops it drops it. Returns how many were
-- looked at, at most `limit`.
local function end_late(queue, limit)
  if limit < 1 then return 0 end
  local due = redis.call('ZRANGEBYSCORE', KEY.deadlines .. queue, '-inf', int(now_ms), 'LIMIT', 0, limit)
  for _, id in ipairs(due) do
    redis.call('ZREM', KEY.deadlines .. queue, id)
    local job = redis.call('HMGET', KEY.job .. id, 'status', 'execution')
    local waits = job[1] ~= 'finished' and job[1] ~= 'failed' and job[1] ~= 'canceled' and job[1] ~= 'stopped'
    if not job[1] then
      forget(id)
    elseif waits and (job[2] or '') == '' and enqueued_again(read_dates(id)) ~= 'new' then
      local reason = late(id)
      if reason then
        bury(queue, id, '', '', nil, 'DEADLINE', reason, LATE)
      else
        watch_deadline(queue, id)
      end
    end
  end
  return #due
end

-- Progress gives the budget back: at least 1 s of stepping, and a checkpoint beyond the best of all earlier
-- executions. Without the first, a poison that emits one output per attempt would live for ever.
local function credit_progress(id, claimed_ms)
  local name = KEY.job .. id
  local point = redis.call('HMGET', KEY.checkpoint .. id, 'offset', 'seq', 'at', 'stepped')
  if number_of(point[3]) < claimed_ms then return false end
  local offset, seq = number_of(point[1]), number_of(point[2])
  local job = redis.call('HMGET', name, 'best_offset', 'best_seq', 'max_retries')
  local best_offset, best_seq = number_of(job[1]), number_of(job[2])
  -- Outputs say more than checkpoints; these count only where there are no outputs.
  if offset <= best_offset and (offset > 0 or seq <= best_seq) then return false end
  redis.call('HSET', name, 'best_offset', int(math.max(offset, best_offset)), 'best_seq', int(math.max(seq, best_seq)))
  -- (An older release says nothing of stepping, and leaves what was said of an earlier checkpoint; there, loading the
  -- model counts as well.)
  local which, ms = string.match(point[4] or '', '^(%d+):(%d+)$')
  local stepped = which == point[2] and tonumber(ms) or number_of(point[3]) - claimed_ms
  if stepped >= 1000 then
    redis.call('HSET', name, 'retries_left', job[3] or '0', 'executions', '0', 'losses', '0', 'crashes', '0', 'waits', '0')
    redis.call('HDEL', name, 'raised')
  end
  return seq - best_seq > 1 or stepped >= 1000
end

-- The one decision after an execution ended without a result; `fail` and `reap` both come here.
-- policy: kind, reason, exception (stored form), evidence (text, or nil), charge ('1' an attempt), crash ('1'; 'alone': it counts as
-- one only for a request that was alone; 'batch': a step raised with others in it, which makes suspects and counts nothing),
-- loss ('1'), retry ('1'),
-- flight (how many the incarnation held), base, cap (s), max_crashes, max_crashes_total, max_executions.
-- Returns 'failed', 'queued' or 'scheduled'. Detaches the holding in any case.
local function decide(queue, id, execution, incarnation, policy)
  local name = KEY.job .. id
  local job = redis.call('HMGET', name, 'worker_name', 'claimed', 'cancel', 'status')
  local worker, claimed_ms = job[1] or '', number_of(job[2], now_ms)
  local started = seconds_of(job[2])
  detach(queue, id, execution, incarnation, worker)
  if job[3] == '1' or job[4] == 'canceled' or job[4] == 'stopped' then
    -- Canceled while it ran, by us or by RQ; its end is the cancel that the worker could not confirm.
    local state = job[4] == 'stopped' and 'stopped' or 'canceled'
    redis.call('HSET', name, 'status', state, 'ended_at', utc(), 'execution', '', 'last', execution .. ':' .. state)
    redis.call('HDEL', name, 'cancel')
    leave_registries(queue, id)
    redis.call('ZADD', KEY.canceled .. queue, int(now_s), id)
    drop_checkpoint(id)
    history(id, 'canceled', worker, execution, '0', '', 'its worker ended before it could confirm')
    share_ttl(id, number_of(redis.call('HGET', name, 'failure_ttl'), 7 * DAY))
    count('canceled', queue)
    hint(redis.call('HGET', name, 'client'), id, 'end')
    return 'canceled'
  end
  local moved = credit_progress(id, claimed_ms)
  local left = number_of(redis.call('HGET', name, 'retries_left'))
  local verdict, delay = 'retry', 0
  local charge, batch = policy.charge, policy.crash == 'batch'
  if policy.retry ~= '1' then verdict = 'bury' end
  if batch then
    -- Not an execution either. But whoever was in so many that raised, and has not moved meanwhile, is no innocent bystander:
    -- one that raises late is cleared each time before it is alone.
    redis.call('HSET', name, 'executions', int(math.max(0, number_of(redis.call('HGET', name, 'executions')) - 1)))
    if add(name, 'raised', 1) > policy.max_crashes_total then charge = '1' end
  end
  if charge == '1' then
    add(name, 'attempt', 1)
    if left < 1 then
      verdict = 'bury'
    else
      add(name, 'retries_left', -1)
      local all = number_of(redis.call('HGET', name, 'max_retries'), left)
      delay = backoff(id, math.max(1, all - left + 1), policy.base, policy.cap)
    end
  end
  -- One loss without evidence accuses nobody; a crash does, and so does a second loss without progress.
  local accused, alone = policy.crash == '1' or batch, policy.flight <= 1
  if policy.loss == '1' then
    local losses = add(name, 'losses', 1)
    -- To have been on a worker that was lost is no fault: the first time, it goes on at once.
    if losses > 1 then
      accused = true
      if alone then delay = math.max(delay, backoff(id, losses - 1, policy.base, policy.cap)) end
    end
  end
  if accused and not batch and add(name, 'crashes_total', 1) >= policy.max_crashes_total then verdict = 'bury' end
  local reason = policy.reason
  -- Without evidence, one that has moved by more than a checkpoint is taken for a victim: kill -9 may come at any time.
  if alone and (policy.crash == '1' or policy.crash == 'alone' and not moved) then
    local crashes = add(name, 'crashes', 1)
    -- Among others, the smaller company of its next run is its delay; the innocent should not wait for the guilty.
    if policy.crash == '1' then delay = math.max(delay, backoff(id, crashes, policy.base, policy.cap)) end
    if crashes >= policy.max_crashes then
      verdict = 'bury'
      reason = reason .. '; this request was alone with each of ' .. int(crashes) .. ' workers that ended so, without progress'
    end
  end
  local executions = number_of(redis.call('HGET', name, 'executions'))
  if executions >= policy.max_executions then verdict = 'bury' end
  if verdict == 'bury' then
    bury(queue, id, execution, worker, started, policy.kind, reason, policy.exception, policy.evidence)
    return 'failed'
  end
  local offset = redis.call('HGET', KEY.checkpoint .. id, 'offset') or '0'
  redis.call('HSET', name, 'execution', '', 'last', execution .. ':retried')
  interrupt(id, execution, worker, policy.kind, claimed_ms, policy.taken)
  count('again:' .. queue, policy.kind)
  if BLAMED[policy.kind] then blame(id, worker, incarnation) end
  if accused then suspect(id, execution, worker, policy.flight, offset, policy.kind) end
  if delay == 0 then
    history(id, 'redelivered', worker, execution, offset, policy.kind, policy.reason, policy.evidence)
    count('redelivered', queue)
    to_front(queue, id)
    return 'queued'
  end
  history(id, 'retry', worker, execution, offset, policy.kind, policy.reason, policy.evidence)
  count('retried', queue)
  to_retries(queue, id, delay)
  return 'scheduled'
end

-- The registry in which a verdict puts an id.
local ENDED = { finished = 'finished', failed = 'failed', canceled = 'canceled', stopped = 'canceled' }

-- An ended request that is to run again loses the TTL of its end. Its outputs, history and results live for a day
-- after each write, as for any living request. So if RQ's tools delete its job, nothing stays for ever.
local function live_again(id)
  redis.call('PERSIST', KEY.job .. id)
  for _, name in ipairs({ KEY.output, KEY.history, KEY.results }) do redis.call('EXPIRE', name .. id, DAY) end
end

-- Requests among these entries of a queue's list that have ended, and are to run again, lose the TTL of that end.
local function keep_requeued(queue, ids)
  for _, id in ipairs(ids) do
    local name = KEY.job .. id
    if redis.call('TTL', name) >= 0 then
      local v = redis.call('HMGET', name, 'task', 'last')
      local registry = ENDED[string.match(v[2] or '', ':(%a+)$')]
      local stands = registry and redis.call('ZSCORE', KEY[registry] .. queue, id)
      if v[1] and registry and (not stands or enqueued_again(read_dates(id))) then
        live_again(id)
      end
    end
  end
end

-- Somebody has put a request that has ended into its queue again: everything starts anew but the checkpoint.
local function begin_anew(id, queue, verdict)
  local name = KEY.job .. id
  leave_registries(queue, id)
  -- A result ends the ordinary course of a request, which is not written down while its hash has the dates.
  local result = verdict == 'finished' and redis.call('XREVRANGE', KEY.results .. id, '+', '-', 'COUNT', 1)[1]
  if result then
    local fields = {}
    for i = 1, #result[2], 2 do fields[result[2][i]] = result[2][i + 1] end
    history(id, 'finished', fields.worker_name, fields.execution_id, '0', '', '', nil, string.match(result[1], '^%d+'))
  end
  live_again(id)
  redis.call('HDEL', name, 'crashes', 'crashes_total', 'losses', 'executions', 'waits', 'best_offset', 'best_seq', 'cancel',
    'error_kind', 'error_reason', 'deadline', 'queue_deadline', 'company', 'suspected', 'failed_on', 'passed_at', 'interrupted',
    'raised', 'started_at') -- RQ's requeue has emptied it; without it nobody takes the request for a new job that waits to be claimed
  redis.call('HSET', name, 'attempt', '0', 'retries_left', redis.call('HGET', name, 'max_retries') or '0', 'last', '')
  history(id, 'requeued', '', '', redis.call('HGET', KEY.checkpoint .. id, 'offset') or '0', '', 'was ' .. verdict)
  count('requeued', queue)
end

-- RQ's `enqueue` saved a plain job over a request: nothing of the request is the job's. (If it calls a task, the worker
-- that claims it makes a request of it: see adopt.lua.)
local function become_plain(id, queue)
  drop_checkpoint(id)
  leave_registries(queue, id)
  redis.call('DEL', KEY.output .. id, KEY.history .. id, KEY.results .. id)
  redis.call('PERSIST', KEY.job .. id)
  -- RQ writes both, or neither.
  if redis.call('HEXISTS', KEY.job .. id, 'retry_intervals') == 0 then redis.call('HDEL', KEY.job .. id, 'retries_left') end
  redis.call('HDEL', KEY.job .. id, 'task', 'payload', 'nonce', 'digest', 'client', 'attempt', 'max_retries', 'execution',
    'holder', 'claimed', 'last', 'epoch', 'entered', 'executions', 'crashes', 'crashes_total', 'losses', 'waits', 'best_offset',
    'best_seq', 'cancel', 'error_kind', 'error_reason', 'deadline', 'queue_deadline', 'step_ms', 'company', 'suspected',
    'failed_on', 'passed_at', 'interrupted', 'trace', 'degraded', 'payload_aside', 'stretched', 'raised', 'aside_at', 'counted_from',
    'dated')
  history(id, 'requeued', '', '', '0', '', 'another job was enqueued under its id')
  count('requeued', queue)
end

-- Canceled by RQ's Job.cancel while it waited: RQ has written status and registry, the rest is ours.
local function settle_canceled(id)
  local name = KEY.job .. id
  local job = redis.call('HMGET', name, 'task', 'last')
  local verdict = string.match(job[2] or '', ':(%a+)$')
  if not job[1] or verdict == 'canceled' or verdict == 'stopped' then return end
  redis.call('HSET', name, 'last', '-:canceled', 'ended_at', utc())
  end_waiting('', id, true)
  drop_checkpoint(id)
  history(id, 'canceled', '', '', '0', '', 'canceled by RQ while it waited')
  count('canceled', redis.call('HGET', name, 'origin') or '')
  share_ttl(id, number_of(redis.call('HGET', name, 'failure_ttl'), 7 * DAY))
  hint(redis.call('HGET', name, 'client'), id, 'end')
end

-- A worker of RQ's own that was given a request puts it where none of them looks, RQ's scheduled registry, and notes it
-- (workers/envelope.py). It has waited its turn, so it goes to the front again. Returns how many entries were looked at.
local function take_bounced(queue, limit)
  local ids = redis.call('SRANDMEMBER', KEY.bounced .. queue, limit)
  for _, id in ipairs(ids) do
    local job = redis.call('HMGET', KEY.job .. id, 'created_at', 'status', 'task')
    if job[1] and job[2] == 'scheduled' and job[3] then
      -- RQ writes the status before it writes the registry: what stands only in the first is not there yet.
      if redis.call('ZREM', KEY.scheduled .. queue, id) == 1 then
        redis.call('SREM', KEY.bounced .. queue, id)
        redis.call('HSET', KEY.job .. id, 'status', 'queued')
        redis.call('LPUSH', KEY.queue .. queue, id)
        count('bounced', queue)
      end
    elseif not job[1] or job[2] ~= 'started' then
      redis.call('SREM', KEY.bounced .. queue, id)
      forget(id)
    end
  end
  return #ids
end

-- Move due retries, and delayed requests whose time has come, to the back of their queue: they neither overtake fresh work nor starve behind it.
-- Returns how many were looked at, at most `limit`, and how many were moved.
local function promote(queue, limit)
  if limit < 1 then return 0, 0 end
  local due = redis.call('ZRANGEBYSCORE', KEY.retries .. queue, '-inf', int(now_ms), 'LIMIT', 0, limit)
  local moved = 0
  for _, id in ipairs(due) do
    redis.call('ZREM', KEY.retries .. queue, id)
    -- A canceled one (RQ's Job.cancel knows nothing of this set) or a deleted one only leaves. Any other status
    -- is for display: a stale writer's must not lose the request, and the claim that pops it knows better.
    local job = redis.call('HMGET', KEY.job .. id, 'status', 'origin')
    local status = job[1]
    if not status then
      forget(id)
    elseif job[2] ~= queue then
      -- It was deleted, and its id used again in another queue, where it has a place of its own.
    elseif status == 'canceled' or status == 'stopped' then
      settle_canceled(id)
    else
      if status == 'scheduled' then
        to_back(queue, id)
      else
        redis.call('RPUSH', KEY.queue .. queue, id)
      end
      moved = moved + 1
    end
  end
  if moved > 0 then ring(queue) end
  return #due, moved
end

-- Make a state the checkpoint's: the state itself, or, with chunks > 0, those that are being written.
-- An older release reads only `state` and `crc`: of chunks it must see what it takes for damaged (byte C1 is in no
-- msgpack value, and -1 is no CRC), or it would go on with no state at all.
local function put_state(id, state, crc, chunks, length)
  local name = KEY.checkpoint .. id
  local marks = redis.call('HMGET', name, 'chunks', 'writing')
  if chunks > 0 then
    redis.call('HSET', name, 'state', '\193', 'crc', '-1', 'chunks', marks[2], 'length', length, 'sum', crc)
  else
    redis.call('HSET', name, 'state', state, 'crc', crc)
    if marks[1] then redis.call('HDEL', name, 'chunks', 'length', 'sum') end
    drop_chunks(id, marks[2])
  end
  if marks[2] then redis.call('HDEL', name, 'writing') end
  drop_chunks(id, marks[1])
end

-- The pulse of the sweeps: called by each script of a sweep that judges by clocks. Returns whether anybody may be judged by
-- them now, and the slack (ms) by which whatever has run out must have done so.
-- A gap between two pulses that is longer than the limit was an outage or a stall. Nobody could be heard in it, so nobody is
-- judged for one heartbeat timeout from then on. The limit is pulse_ms, or three times the widest gap of late: where all calls are
-- slow, sweeps take long, and must judge all the same. By as much as the limit has grown, an outage may go unnoticed; hence
-- the slack, which is as long.
local function pulse(timeout_ms, pulse_ms)
  local row = redis.call('HMGET', KEY.pulse, 'at', 'since', 'gap')
  local at, since, widest = number_of(row[1]), number_of(row[2]), number_of(row[3])
  local limit = math.max(pulse_ms, 3 * widest)
  local known = at > 0 and since > 0 and at <= now_ms
  local gap = known and now_ms - at or 0
  if not known or gap > limit then since = now_ms end
  if at > now_ms + 1000 then
    -- The server's clock was set back. What stands in Redis with the old one's times lies too far ahead until then.
    redis.call('HSET', KEY.pulse, 'back_until', int(at + 60000))
  elseif at > 0 and gap > limit then
    redis.call('HSET', KEY.pulse, 'away_from', int(at), 'away_to', now_text)
  end
  -- At most twice the limit, and forgotten within a few sweeps: what an outage of an hour leaves is over with its grace.
  widest = math.max(math.min(gap, 2 * limit, 2 * timeout_ms), math.floor(widest * 7 / 8))
  redis.call('HSET', KEY.pulse, 'at', int(now_ms), 'since', int(since), 'gap', int(widest))
  return now_ms - since >= timeout_ms, limit - pulse_ms, since
end

-- Whether the server's clock was set back lately: see pulse().
local function set_back()
  return now_ms < number_of(redis.call('HGET', KEY.pulse, 'back_until'))
end

-- Checkpoints written before this moment (ms) are older than ttl_ms. Time without sweeps does not count, neither the
-- last gap nor one that still goes on: in an outage no request could go on, and when the server's clock steps ahead no
-- time passes.
local function stale_before(ttl_ms)
  local row = redis.call('HMGET', KEY.pulse, 'at', 'away_from', 'away_to')
  local at, from, to = number_of(row[1]), number_of(row[2]), number_of(row[3])
  local swept = at > 0 and at < now_ms and at or now_ms
  local cut = swept - ttl_ms
  if from == 0 or to > swept or cut >= to then return cut end
  return cut - (to - from)
end

-- A page of a sorted set or list, another one in each period of so many ms: all members come once in size / n of them.
local function some_of(name, size, period_ms, command, count)
  local number = redis.call(count or 'ZCARD', name)
  if number == 0 then return {} end
  local place = math.floor(now_ms / period_ms) % math.ceil(number / size) * size
  return redis.call(command or 'ZRANGE', name, int(place), int(place + size - 1))
end

-- Append outputs at an absolute offset and store a state, for an execution known to be current.
-- Returns the new number of outputs, or nil with the number stored when the offset leaves a gap.
-- Sent again after a lost reply, it changes nothing: what is below the stored offset is there already.
-- point: 'offset', 'seq' and 'at' of the checkpoint that is there, and `claimed`, the ms of this execution's claim; points:
-- a batch of ZADD, for whose sending the caller cares. new: what progress.lua takes, by its names; `kept` has names and
-- values of the fields that only stand in the checkpoint.
local function store(id, point, new, points)
  local name = KEY.checkpoint .. id
  local have, have_seq = number_of(point[1]), number_of(point[2])
  local offset, outputs, seq = tonumber(new.offset), tonumber(new.outputs), tonumber(new.seq)
  if offset > have then return nil, have end
  if outputs > 0 and offset + outputs > have then
    -- Resends are verbatim, so an entry is stored whole or not at all.
    if offset ~= have then return nil, have end
    redis.call('RPUSH', KEY.output .. id, new.blob)
    if have == 0 then redis.call('EXPIRE', KEY.output .. id, DAY) end
    have = have + outputs
  end
  if seq > have_seq then
    redis.call('HSET', name, 'seq', int(seq), 'offset', int(have), 'at', int(now_ms),
      'stepped', int(seq) .. ':' .. new.stepped, unpack(new.kept))
    if new.has_state == '1' then put_state(id, new.state, new.crc, tonumber(new.chunks), new.length) end
    points.add(KEY.checkpoints, now_text, id)
    -- Not at every checkpoint: what lives for a day is told so at an execution's first one, and once in every hour.
    local at = number_of(point[3])
    if at <= number_of(point.claimed) or math.floor(at / HOUR_MS) ~= math.floor(now_ms / HOUR_MS) then refresh(id) end
  end
  return have
end
