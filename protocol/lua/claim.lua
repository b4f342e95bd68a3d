-- Take requests from queues: pop, execution, lease and RQ's registration in one step.
--
-- ARGV incarnation  of the worker process
-- ARGV worker       RQ worker name
-- ARGV queues_text  its queues, comma-separated (see listed() in lib/serves)
-- ARGV timeout_ms   ms until an incarnation of which no heartbeat has come yet counts as dead
-- ARGV lease_ms     length of a lease, but for requests that have a step timeout of their own
-- ARGV task         dotted path of what the worker runs now; '' when it holds nothing
-- ARGV free         slots free for that task; when task is '', slots for a task not listed below
-- ARGV ttl_ms       age at which a checkpoint is stale
-- ARGV resume       '1'; '0' starts every request from zero (a test of the demo turns resuming off)
-- ARGV max_bytes    stop taking requests once so many bytes of payload are in the reply
-- ARGV stem         with what the ids of the executions to be made begin; new with every call
-- EACH queue: queue      queue names, first served first
-- EACH task: path        a task that the worker has loaded ...
-- EACH task: slots       ... and how many of it the worker runs at once
-- EACH known: id         requests that the worker knows it holds
-- EACH unable: left       tasks that it could not load, and leaves to others for now
--
-- Returns  status, n, '1' if the pool is degraded, now (ms), then n rows of: id, execution, queue, kind ('request' | 'plain'), task, payload, attempt,
--          seq, offset, epoch, fingerprint of the checkpoint, client, timeout (s; plain jobs), step timeout of its
--          own (ms; ''), date of its submit, with tabs before what there is besides: date of its last coming into the
--          queue, the producer's trace, what became of the execution before
--          status 'ok'; 'blocked' (what waits needs an empty worker, one that isolates, or another one, or this one holds enough
--          for a degraded pool); 'more' (work was left);
--          'suspended'; 'reaped' (this incarnation was declared dead: it holds nothing any more)
--
-- A suspect (its hash has `company`, the most requests that may be in flight beside and with it) waits in a set of its
-- own. A worker that holds nothing takes the oldest and as many others as each of them allows, and nothing else until
-- it is empty or they are cleared (progress.lua); at most half of the living workers do so at a time.
--
-- While the pool is degraded, a worker fills half of its slots, and at least one. What it has beyond that runs on.
--
-- A request that failed on this worker or its device (failed_on, see lib/blame) is left to another one that
-- lives and serves its queue (and, for a suspect, holds nothing), for 2 s since it was first passed over (passed_at). It keeps its place meanwhile.
--
-- What `held` has and the caller lacks was given in a reply that got lost: it is given again first, with the
-- execution it has.

--- @include lib/arguments
--- @include lib/batch
--- @include lib/begin_anew
--- @include lib/bounced
--- @include lib/counters
--- @include lib/dates
--- @include lib/detach
--- @include lib/end_if_late
--- @include lib/ended
--- @include lib/enqueued_again
--- @include lib/forget
--- @include lib/history
--- @include lib/is_canceled
--- @include lib/lease
--- @include lib/mode
--- @include lib/never_refused
--- @include lib/numbers
--- @include lib/owns
--- @include lib/places
--- @include lib/promote
--- @include lib/reaped
--- @include lib/registries
--- @include lib/restart
--- @include lib/ring
--- @include lib/runs
--- @include lib/serves
--- @include lib/settle_canceled
--- @include lib/show_execution
--- @include lib/stale
--- @include lib/time
--- @include lib/to_queue
--- @include lib/verdict
--- @include lib/void
--- @include lib/worker_state

never_refused()

local incarnation, worker, queues_text, timeout_ms, lease_ms = arg(), arg(), arg(), arg(), arg()
local task, free, ttl_ms, resume, max_bytes, stem = arg(), arg(), arg(), arg(), arg(), arg()
timeout_ms, lease_ms, free, ttl_ms = tonumber(timeout_ms), tonumber(lease_ms), tonumber(free), tonumber(ttl_ms)
max_bytes = tonumber(max_bytes)
local queues, slots_of, known, unable = {}, {}, {}, {}
for _ = 1, tonumber(arg()) do
  local queue = arg()
  queues[#queues + 1] = queue
end
for _ = 1, tonumber(arg()) do
  local path, slots = arg(), arg()
  slots_of[path] = tonumber(slots)
end
for _ = 1, tonumber(arg()) do
  local id = arg()
  known[id] = true
end
for _ = 1, tonumber(arg()) do
  local left = arg()
  unable[left] = true
end

if reaped(incarnation) then return { 'reaped', '0', '0', now_text } end
local short = degraded()

local function fresh(n) return stem .. string.format('%06x', n) end

-- Before anything is popped: a user whom an ACL forbids to hold requests is refused here, where nothing is lost yet.
redis.call('HDEL', KEY.held .. incarnation, '')

local rows, number, bytes = {}, 0, 0

-- What is wanted of a job and of its checkpoint, read once: a call of Redis costs more than what it reads. Each is a
-- table made in one piece: one that grows field by field costs as much as the call.
local function read_job(name)
  local v = redis.call('HMGET', name, 'status', 'last', 'created_at', 'task', 'payload', 'attempt', 'epoch', 'client',
    'timeout', 'step_ms', 'deadline', 'queue_deadline', 'company', 'degraded', 'executions', 'failed_on', 'passed_at',
    'enqueued_at', 'interrupted', 'trace', 'claimed', 'execution', 'holder', 'entered', 'started_at')
  return {
    status = v[1] or nil, last = v[2] or nil, created_at = v[3] or nil, task = v[4] or nil, payload = v[5] or nil,
    attempt = v[6] or nil, epoch = v[7] or nil, client = v[8] or nil, timeout = v[9] or nil, step_ms = v[10] or nil,
    deadline = v[11] or nil, queue_deadline = v[12] or nil, company = v[13] or nil, degraded = v[14] or nil,
    executions = v[15] or nil, failed_on = v[16] or nil, passed_at = v[17] or nil, enqueued_at = v[18] or nil,
    interrupted = v[19] or nil, trace = v[20] or nil, claimed = v[21] or nil, execution = v[22] or nil,
    holder = v[23] or nil, entered = v[24] or nil, started_at = v[25] or nil,
  }
end

local function read_point(id)
  local v = redis.call('HMGET', KEY.checkpoint .. id, 'seq', 'offset', 'fingerprint', 'at', 'chunks', 'writing')
  return { seq = v[1] or nil, offset = v[2] or nil, fingerprint = v[3] or nil, at = v[4] or nil, chunks = v[5] or nil,
    writing = v[6] or nil }
end

-- What is measured and traced of it; mostly the date of its submit alone.
local function told(job)
  local again = job.enqueued_at ~= job.created_at
  if not (again or job.interrupted or job.trace) then return job.created_at or '' end
  return table.concat({ job.created_at or '', again and job.enqueued_at or '', job.trace or '', job.interrupted or '' }, '\t')
end

local function give(id, execution, queue, job, point)
  job = job or read_job(KEY.job .. id)
  point = point or read_point(id)
  local n, payload = #rows, job.payload or ''
  rows[n + 1], rows[n + 2], rows[n + 3], rows[n + 4] = id, execution, queue, job.task and 'request' or 'plain'
  rows[n + 5], rows[n + 6], rows[n + 7], rows[n + 8] = job.task or '', payload, job.attempt or '0', point.seq or '0'
  rows[n + 9], rows[n + 10], rows[n + 11] = point.offset or '0', job.epoch or '0', point.fingerprint or ''
  rows[n + 12], rows[n + 13], rows[n + 14], rows[n + 15] = job.client or '', job.timeout or '-1', job.step_ms or '', told(job)
  number = number + 1
  bytes = bytes + #payload
end

-- 1. What was given before and did not arrive.
local held = redis.call('HGETALL', KEY.held .. incarnation)
for i = 1, #held, 2 do
  local id, execution = held[i], held[i + 1]
  if not known[id] then
    local job = redis.call('HMGET', KEY.job .. id, 'execution', 'origin', 'task', 'step_ms', 'started_at', 'timeout')
    if owns(id, execution, job[1], job[5]) then
      if job[3] then
        redis.call('ZADD', KEY.leases .. job[2], int(now_ms + lease_length(job[4], lease_ms)), id)
      else
        -- A plain job keeps its own lease: it is one long step.
        redis.call('ZADD', KEY.leases .. job[2], 'NX', int(now_ms + plain_lease(number_of(job[6], 180))), id)
      end
      give(id, execution, job[2])
      task = job[3] or ''
      free = 0 -- the caller sees what it holds before it asks for more
    else
      void(id, execution, incarnation, job[2] or nil)
    end
  end
end

local function answer(status)
  local reply = { status, int(number), short and '1' or '0', now_text }
  for _, value in ipairs(rows) do reply[#reply + 1] = value end
  return reply
end
if number > 0 then return answer('ok') end
if redis.call('EXISTS', KEY.suspended) == 1 then return answer('suspended') end

-- Everything that this claim takes is written in one call for each key, at the end; only then does it leave its queue.
-- A script that stops before leaves every id where it was popped from, and a request that waits is what no lease names.
local took, leases, holds = {}, batch('ZADD'), batch('HSET')
local shown, waited = batch('ZADD'), batch('ZREM')

-- 2. Is the popped id to be run? Its job if it is; whatever is not, leaves the queue here, and its history says why; but for
-- one that is to wait where it stands (`later`).
local function dropped(id, queue, reason)
  local ttl = redis.call('TTL', KEY.job .. id)
  history(id, 'dropped', worker, '', '0', '', reason)
  if ttl > 0 then redis.call('EXPIRE', KEY.history .. id, ttl) end
  count('dropped', queue)
end

local function runnable(id, queue)
  local name = KEY.job .. id
  local job = read_job(name)
  if not job.created_at then
    forget(id)
    redis.call('ZREM', KEY.ended .. queue, id)
    count('dropped', queue)
    return nil
  end
  if took[id] then
    dropped(id, queue, 'it stood in its queue twice')
    return nil
  end
  local runs_now = job.execution and runs(id, job.execution, job.holder)
  local verdict = verdict_of(job.last)
  local registry = ENDED[verdict]
  -- It ended while it waited here; what became of it stands in its history. (If it was deleted, and its id used again, the
  -- mark is of another one: that a request ended without an execution stands in its last verdict.)
  local marked = registry and redis.call('ZREM', KEY.ended .. queue, id) == 1
  if marked and string.sub(job.last, 1, 2) == '-:' then
    count('dropped', queue)
    return nil
  end
  local again = (job.claimed or registry or job.started_at) and enqueued_again(job)
  if registry and not stands_ended(queue, id, verdict) then again = 'same' end -- RQ's requeue took it out
  if runs_now then
    if not again then
      dropped(id, queue, 'it runs already')
      return nil
    end
    -- The same request once more: after the run that goes on.
    if job.task and again == 'same' then return nil, 'later' end
    -- A new job, or a plain one: now, as RQ does. What runs is not this job's execution any more.
    detach(queue, id, job.execution, job.holder, redis.call('HGET', KEY.incarnation .. job.holder, 'worker') or '')
  end
  if again == 'new' and job.task then
    become_plain(id, queue)
    job = read_job(name)
  end
  if not job.task then
    -- A plain job that we once ended may be enqueued again under the same id; RQ's status is its truth.
    if verdict then
      redis.call('HDEL', name, 'last')
      leave_registries(queue, id)
    end
    if is_canceled(job.status) then
      count('dropped', queue)
      return nil
    end
    return job
  end
  if registry then
    if not again then
      -- It ended, and somebody with an old copy of the job pushed it and wrote its status.
      redis.call('HSET', name, 'status', verdict)
      dropped(id, queue, 'it has ended, and was not enqueued again since')
      return nil
    end
    begin_anew(id, queue, verdict)
    job = read_job(name)
  elseif is_canceled(job.status) then
    settle_canceled(id)
    count('dropped', queue)
    return nil
  end
  if job.deadline or job.queue_deadline then
    if end_if_late(queue, id) then
      redis.call('ZREM', KEY.ended .. queue, id) -- its entry is the one that is met here
      return nil
    end
  end
  waited.add(KEY.retries .. queue, id)
  return job
end

-- A queue's entry of a suspect leads nowhere: it may only run in limited company (5).
local function waits_apart(id, queue, job)
  if not job.company then return false end
  to_suspects(queue, id)
  return true
end

-- Whether a request that may run here is left to another worker for a while.
local here, living
-- Of each living worker, at most 128: queues, place, whether it holds nothing. Read once: a claim looks at 128 requests.
local function read_living()
  local found = {}
  for _, other in ipairs(redis.call('ZRANGEBYSCORE', KEY.beats, '(' .. now_text, '+inf', 'LIMIT', 0, 128)) do
    local record = other ~= incarnation and redis.call('HMGET', KEY.incarnation .. other, 'ready', 'queues', 'worker')
    if record and record[1] == '1' then
      found[#found + 1] = { queues = record[2] or '', place = where(other, record[3] or ''),
        empty = redis.call('EXISTS', KEY.held .. other) == 0 }
    end
  end
  return found
end

local function passed_over(id, queue, suspects, job)
  local name = KEY.job .. id
  job = job or read_job(name)
  if not job.failed_on then return false end
  here = here or where(incarnation, worker)
  if not failed_there(job.failed_on, here) then return false end
  local waited = job.passed_at and now_ms - number_of(job.passed_at) or 0
  if waited < 0 or waited >= 2000 then return false end
  living = living or read_living()
  for _, other in ipairs(living) do
    if serves(other.queues, queue) and (other.empty or not suspects) and not failed_there(job.failed_on, other.place) then
      -- Once: the other is woken now, and this one is not to be woken by its own bell until then.
      if redis.call('HSETNX', name, 'passed_at', now_text) == 1 then ring(queue) end
      return true
    end
  end
  return false
end

-- 3. What begins from zero while the pool is degraded takes the payload that its producer gave for that; afterwards,
-- the whole one again. The one that runs stands in `payload`, the other one aside, so that whoever resumes it, a
-- worker of an older release too, runs the same.
local function choose_payload(id, job)
  if not job.degraded or redis.call('EXISTS', KEY.checkpoint .. id) == 1 then return end
  local wanted = short and '1' or '0'
  if wanted == job.degraded then return end
  local name = KEY.job .. id
  local payloads = redis.call('HMGET', name, 'payload', 'payload_aside')
  if not payloads[2] then return end
  redis.call('HSET', name, 'degraded', wanted, 'payload', payloads[2], 'payload_aside', payloads[1])
  local reason = wanted == '1' and 'the pool is degraded: it runs with its overrides' or 'the pool has recovered: it runs without its overrides'
  history(id, wanted == '1' and 'degraded' or 'restored', '', '', '0', '', reason)
  job.payload = payloads[2]
end

-- 4. Execution, lease, and what RQ's own worker would have written. RQ's record of the execution itself follows with the
-- first checkpoint or renewal (lib/show_execution): a short request ends before anybody has the time to read it.
local taken = {}

local function take(id, queue, execution, job, plain_timeout)
  local name = KEY.job .. id
  local length = plain_timeout and plain_lease(plain_timeout) or lease_length(job.step_ms, lease_ms)
  if plain_timeout then
    redis.call('PERSIST', name) -- what of ours comes again was persisted above
  end
  took[id] = true
  leases.add(KEY.leases .. queue, int(now_ms + length), id)
  holds.add(KEY.held .. incarnation, id, execution)
  shown.add(KEY.wip .. queue, int(now_s + HOUR), id .. ':' .. execution)
  redis.call('HSET', name, 'status', 'started', 'started_at', utc(), 'last_heartbeat', utc(), 'worker_name', worker,
    'execution', execution, 'claimed', now_text, 'holder', incarnation, 'executions', int(number_of(job.executions) + 1))
  -- What enqueued_again() compares with. A request that was submitted and claimed once has it in `created_at`.
  if job.enqueued_at ~= job.created_at then
    redis.call('HSET', name, 'entered', (job.enqueued_at or '') .. ' ' .. job.created_at)
  elseif job.entered then
    redis.call('HDEL', name, 'entered')
  end
  if job.passed_at then redis.call('HDEL', name, 'passed_at') end
  if job.deadline or job.queue_deadline then
    if redis.call('ZREM', KEY.deadlines .. queue, id) == 1 then redis.call('HDEL', name, 'queue_deadline') end
  end
  if plain_timeout then show_execution(id, execution, worker, now_text) end
  taken[queue] = (taken[queue] or 0) + 1
end

local status, used, scanned, aside = 'ok', 0, 0, 0
local empty = next(held) == nil

-- A checkpoint that is stale or foreign to this run is no place to go on from.
local function start(id, queue, execution, job)
  -- Nothing at all is the usual case: it was never claimed.
  local point = job.claimed and read_point(id) or {}
  local reason
  if not job.claimed then
    -- And so it has neither outputs nor a checkpoint.
  elseif not point.at then
    if next(point) or redis.call('EXISTS', KEY.output .. id) == 1 then reason = 'no checkpoint' end
  elseif number_of(point.at) < now_ms - ttl_ms and number_of(point.at) < stale_before(ttl_ms) then
    reason = 'the checkpoint was older than ' .. int(ttl_ms / 1000) .. ' s'
  elseif resume == '0' then
    reason = 'resuming is turned off'
  end
  if reason then
    restart(id, reason, execution)
    job.epoch, point = redis.call('HGET', KEY.job .. id, 'epoch'), {}
  end
  choose_payload(id, job)
  if job.interrupted then
    redis.call('HDEL', KEY.job .. id, 'interrupted')
    if point.at then
      count('resumed:' .. queue, string.match(job.interrupted, '^[%w_]+') or 'UNKNOWN')
      count('kept', queue, number_of(point.offset))
    end
  end
  take(id, queue, execution, job)
  give(id, execution, queue, job, point)
end

-- How many more of what has so many slots this worker may take, if it holds some.
local function room(slots, holds)
  return (short and math.max(1, math.floor(slots / 2)) or slots) - holds
end

-- 5. Suspects. Whether this worker may isolate: it does already, or fewer than half of the living do.
local function may_isolate()
  for _, other in ipairs(redis.call('ZRANGE', KEY.isolating, 0, 127)) do
    if other == incarnation then return true end
    -- Whoever holds nothing has drained, ended or died.
    if redis.call('EXISTS', KEY.held .. other) == 0 then redis.call('ZREM', KEY.isolating, other) end
  end
  local living = redis.call('ZCOUNT', KEY.beats, '(' .. now_text, '+inf')
  return redis.call('ZCARD', KEY.isolating) < math.max(1, math.floor(living / 2))
end

local function isolate()
  redis.call('ZADD', KEY.isolating, now_text, incarnation)
  redis.call('EXPIRE', KEY.isolating, DAY) -- a suspect may run for hours before it is cleared
end

-- Give the oldest suspect of a queue, and as many more of its task as each of them allows.
local function give_suspects(queue)
  local name, company, limit = KEY.suspects .. queue, 128, free
  for _, id in ipairs(redis.call('ZRANGE', name, 0, 127)) do
    local job = redis.call('HMGET', KEY.job .. id, 'task', 'company', 'origin')
    if job[1] and job[3] ~= queue then waited.add(name, id) end -- deleted, and its id used again in another queue
    local allowed = math.min(company, number_of(job[2], 1))
    if job[1] and job[3] ~= queue then
      -- It has a place of its own there.
    elseif unable[job[1] or ''] then
      aside = aside + 1
    elseif task == '' or not job[1] or job[1] == task then
      if used > 0 and used + 1 > allowed then break end
      local found
      if passed_over(id, queue, true) then
        aside = aside + 1
      else
        local later
        found, later = runnable(id, queue)
        if not later then waited.add(name, id) end
      end
      if found then
        company, used = allowed, used + 1
        if task == '' then
          task = job[1]
          limit = room(slots_of[task] or free, 0)
        end
        start(id, queue, fresh(used), found)
        if used >= math.min(limit, company) or bytes >= max_bytes then break end
      end
    end
  end
end

local isolates = redis.call('ZSCORE', KEY.isolating, incarnation)
if isolates and not empty then return answer('blocked') end -- it holds suspects, or drains for them
local apart = false
-- What is due is moved in all queues together as far as one call may go: with each of 500 queues by itself it took a second.
local budget = 128
for _, queue in ipairs(queues) do
  budget = budget - promote(queue, budget)
  budget = budget - take_bounced(queue, budget)
  -- A worker that is never empty would get none: after 5 s one is reserved for the oldest, and drains.
  local since = empty and '+inf' or int(now_ms - 5000)
  if used == 0 and #redis.call('ZRANGEBYSCORE', KEY.suspects .. queue, '-inf', since, 'LIMIT', 0, 1) > 0 then
    if not may_isolate() then
      apart = true
    elseif empty then
      give_suspects(queue)
    else
      isolate()
      return answer('blocked')
    end
  end
end
if used > 0 then
  isolate()
elseif isolates then
  redis.call('ZREM', KEY.isolating, incarnation)
end

-- 6. The queues, in their order, until the slots are full.
local limit = free
if task == '' then
  limit = 1 -- until the first entry says which task it is
elseif short then
  limit = math.min(free, room(slots_of[task] or free + #held / 2, #held / 2))
  if limit < 1 and used == 0 then return answer('blocked') end
end
if used > 0 then limit = 0 end -- suspects have no other company
local passed = {}
for _, queue in ipairs(queues) do
  local name = KEY.queue .. queue
  local drained, back, popped, page, place = false, {}, 0, {}, 0
  while used < limit and bytes < max_bytes do
    if scanned >= 128 then
      -- If all that was looked at is left to others, to look again at once would find the same.
      status = #back < popped and 'more' or 'blocked'
      break
    end
    place = place + 1
    if place > #page then
      page, place = redis.call('LRANGE', name, popped, popped + math.min(limit - used, 128 - scanned) - 1), 1
      if #page == 0 then
        drained = true
        break
      end
    end
    local id = page[place]
    local job, later = runnable(id, queue)
    local path = job and job.task
    if later or (path and unable[path] and not job.company) then
      back[#back + 1] = id
    elseif not job or waits_apart(id, queue, job) then
      -- It leaves the queue.
    elseif passed_over(id, queue, false, job) then
      back[#back + 1] = id
    else
      if (not path and not (empty and task == '')) or (path and task ~= '' and path ~= task) then
        status = 'blocked' -- it needs an empty worker; it keeps its place
        break
      end
      used = used + 1
      if path then
        if task == '' then
          task = path
          limit = room(slots_of[path] or free, 0)
        end
        start(id, queue, fresh(used), job)
      else
        take(id, queue, fresh(used), job, number_of(job.timeout, 180))
        give(id, fresh(used), queue, job)
        task = '\0plain' -- alone: nothing else matches this
        limit = used
      end
    end
    popped, scanned = popped + 1, scanned + 1
  end
  if popped > 0 then passed[#passed + 1] = { name = name, popped = popped, back = back } end
  aside = aside + #back
  if status ~= 'ok' then break end
  if drained then
    if #back == 0 then redis.call('DEL', KEY.bell .. queue, KEY.ended .. queue) end
  elseif redis.call('LLEN', name) > popped then
    ring(queue) -- another idle worker may take the rest
    status = 'more'
  end
  if used >= limit then break end
end

if status == 'ok' and number == 0 and (apart or aside > 0) then status = 'blocked' end -- what waits is left to others

leases.send()
holds.send()
shown.send()
for _, part in ipairs(passed) do
  redis.call('LTRIM', part.name, part.popped, -1)
  for i = #part.back, 1, -1 do redis.call('LPUSH', part.name, part.back[i]) end
end
waited.send()
if number > 0 then
  for queue, many in pairs(taken) do
    count('claimed', queue, many)
    redis.call('SADD', KEY.swept, queue)
  end
  -- The first heartbeat may come later than the worker's death: the claim itself is a sign of life.
  redis.call('ZADD', KEY.beats, 'NX', int(now_ms + timeout_ms), incarnation)
  -- For people: what it runs, and how much of it at once. A plain job is alone.
  local path = task ~= '\0plain' and task or ''
  redis.call('HSET', KEY.incarnation .. incarnation, 'worker', worker, 'task', path, 'slots', path == '' and '1' or slots_of[path] and int(slots_of[path]) or '',
    'lease', int(lease_ms))
  -- Until the first heartbeat, which knows the names that the worker was started with.
  redis.call('HSETNX', KEY.incarnation .. incarnation, 'queues', queues_text)
  if empty then redis.call('HDEL', KEY.incarnation .. incarnation, 'hung', 'hung_at') end -- whoever hung here before has gone
  redis.call('EXPIRE', KEY.incarnation .. incarnation, DAY)
  show_state(worker, incarnation)
elseif not empty and slots_of[task] then
  redis.call('HSET', KEY.incarnation .. incarnation, 'slots', int(slots_of[task])) -- known only once it was loaded
end
return answer(status)
