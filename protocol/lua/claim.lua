-- Take requests from queues: pop, execution, lease and RQ's registration in one step.
--
-- ARGV incarnation  of the worker process
-- ARGV worker       RQ worker name
-- ARGV queues_text  its queues, comma-separated (see listed() in lib/pool/serves)
-- ARGV timeout_ms   ms until an incarnation of which no heartbeat has come yet counts as dead
-- ARGV lease_ms     length of a lease, but for requests that have a step timeout of their own
-- ARGV task         dotted path of what the worker runs now; '' when it holds nothing
-- ARGV free         slots free for that task; when task is '', slots for a task not listed below
-- ARGV ttl_ms       age at which a checkpoint is stale
-- ARGV resume       '1'; '0' starts every request from zero (a test of the demo turns resuming off)
-- ARGV max_bytes    stop taking requests once so many bytes of payload are in the reply
-- ARGV stem         with what the ids of the executions to be made begin; new with every call
-- ARGV crowd        a short name of all workers with its queues (keys.crowd); '' unless the caller holds nothing
-- EACH queue: queue      queue names, first served first
-- EACH task: path        a task that the worker has loaded ...
-- EACH task: slots       ... and how many of it the worker runs at once
-- EACH known: id         requests that the worker knows it holds
-- EACH unable: left       tasks that it could not load, and leaves to others for now
--
-- Returns  status, n, '1' if the pool is degraded, now (ms), '1' if the caller is to ask again in a second (the others
--          of its crowd wait until they are rung), then n rows of 17: id, execution, queue, kind ('request' |
--          'plain'), task, payload, attempt, seq, offset, epoch, fingerprint of the checkpoint, client, timeout (s;
--          plain jobs), step timeout of its own (ms; ''), date of its submit, with tabs before what there is besides:
--          date of its last coming into the queue, the producer's trace, what became of the execution before; '1' if
--          somebody listens to its outputs now; '1' if its checkpoints have more to look at than who holds it (a
--          deadline, a step timeout of its own, company)
--          status 'ok'; 'blocked' (what waits needs an empty worker, one that isolates, or another one, or this one
--          holds enough for a degraded pool); 'more' (work was left); 'suspended'; 'reaped' (this incarnation was
--          declared dead: it holds nothing any more)
--
-- A suspect (its hash has `company`, the most requests that may be in flight, itself included) waits in a set of its
-- own. A worker that holds nothing takes the oldest and as many others as each of them allows, and nothing else until
-- it is empty or they are cleared (progress.lua). At most half of the living workers do so at a time.
--
-- While the pool is degraded, a worker fills half of its slots, and at least one. What it has beyond that runs on.
--
-- A request that failed on this worker or its device (failed_on, see lib/failure/blame) is left for 2 s, from when it
-- was first passed over (passed_at), if another living worker serves its queue (and, for a suspect, holds nothing).
-- Meanwhile it keeps its place in the queue.
--
-- What the caller holds and does not know was given in a reply that got lost: it is given again first, each with its
-- execution.

--- @include claim/choose_payload
--- @include claim/due_aside
--- @include claim/given_again
--- @include claim/isolation
--- @include claim/listening
--- @include claim/passed_over
--- @include claim/read_job
--- @include claim/runnable
--- @include claim/show_holder
--- @include claim/start_job
--- @include claim/start_point
--- @include claim/take_turns
--- @include claim/told
--- @include lib/basics/arguments
--- @include lib/basics/batch
--- @include lib/basics/counters
--- @include lib/basics/never_refused
--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/failure/push
--- @include lib/lease/lease
--- @include lib/lease/reaped
--- @include lib/pool/mode
--- @include lib/queue/bounced
--- @include lib/queue/promote
--- @include lib/queue/ring
--- @include lib/queue/turn
--- @include lib/rq/show_execution

never_refused()

local incarnation, worker, queues_text, timeout_ms, lease_ms = arg(), arg(), arg(), arg(), arg()
local task, free, ttl_ms, resume, max_bytes, stem, crowd = arg(), arg(), arg(), arg(), arg(), arg(), arg()
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

if reaped(incarnation) then return { 'reaped', '0', '0', now_text, '0' } end

-- Before anything is popped: a user whom an ACL forbids to hold requests is refused here, where nothing is lost yet.
redis.call('HDEL', KEY.held .. incarnation, '')

local short = degraded()
local held = redis.call('HGETALL', KEY.held .. incarnation)
local empty = next(held) == nil

-- What this call takes: rows of its reply, ids, how many of each queue, parts of queues that were read. It is written
-- at the end, with one call for each key, and only then leaves its queue: if the script stops before, every id still
-- stands where it was found, and whatever no lease names counts as waiting.
local rows, ids, number, bytes = {}, {}, 0, 0
local took, taken, passed = {}, {}, {}
local leases, holds, started, waited = batch('ZADD'), batch('HSET'), batch('ZADD'), batch('ZREM')

local status, used, scanned, aside, apart = 'ok', 0, 0, 0, false
local limit = free

local function answer(status)
  local reply = { status, int(number), short and '1' or '0', now_text, '0' }
  if empty and crowd ~= '' then
    if number > 0 then
      pass_turn(crowd, incarnation)
    elseif take_turn(crowd, incarnation, status) then
      reply[5] = '1'
    end
  end
  for _, value in ipairs(rows) do reply[#reply + 1] = value end
  for place, listens in ipairs(listening(ids)) do reply[4 + 17 * place] = listens end
  return reply
end

local function add_row(id, execution, queue, job, point)
  local n, payload = #rows, job.payload or ''
  rows[n + 1], rows[n + 2], rows[n + 3], rows[n + 4] = id, execution, queue, job.task and 'request' or 'plain'
  rows[n + 5], rows[n + 6], rows[n + 7], rows[n + 8] = job.task or '', payload, job.attempt or '0', point.seq or '0'
  rows[n + 9], rows[n + 10], rows[n + 11] = point.offset or '0', job.epoch or '0', point.fingerprint or ''
  rows[n + 12], rows[n + 13], rows[n + 14] = job.client or '', job.timeout or '-1', job.step_ms or ''
  rows[n + 15], rows[n + 16] = told(job), '0'
  rows[n + 17] = (job.deadline or job.step_ms or job.company) and '1' or '0'
  number = number + 1
  ids[number] = id
  bytes = bytes + #payload
end

-- How many requests this worker may take of a task that it runs so many of at once, if it holds some already.
local function room(slots, holds_now)
  return (short and math.max(1, math.floor(slots / 2)) or slots) - holds_now
end

-- A worker that holds nothing runs the task that comes first.
local function settle_on(path)
  task = path
  limit = room(slots_of[path] or free, 0)
end

-- Execution, lease, and what RQ's own worker writes. RQ's record of the execution follows with the first checkpoint or
-- renewal (lib/rq/show_execution): most requests have ended by then.
local function take(id, queue, execution, job, lease)
  took[id] = true
  leases.add(KEY.leases .. queue, int(now_ms + lease), id)
  holds.add(KEY.held .. incarnation, id, execution)
  started.add(KEY.wip .. queue, int(now_s + HOUR), id .. ':' .. execution)
  start_job(id, queue, execution, job, incarnation, worker)
  taken[queue] = (taken[queue] or 0) + 1
end

local function take_request(id, queue, job)
  local execution = stem .. string.format('%06x', used)
  -- One that was never claimed has neither outputs nor a checkpoint.
  local point = job.claimed and start_point(id, execution, job, ttl_ms, resume) or {}
  if job.degraded then choose_payload(id, job, short) end
  if job.interrupted then
    redis.call('HDEL', KEY.job .. id, 'interrupted')
    if point.at then
      count('resumed:' .. queue, string.match(job.interrupted, '^[%w_]+') or 'UNKNOWN')
      count('kept', queue, number_of(point.offset))
    end
  end
  take(id, queue, execution, job, lease_length(job.step_ms, lease_ms))
  add_row(id, execution, queue, job, point)
end

local function take_plain(id, queue, job)
  local execution = stem .. string.format('%06x', used)
  redis.call('PERSIST', KEY.job .. id) -- what of ours comes again was persisted before
  take(id, queue, execution, job, plain_lease(number_of(job.timeout, 180)))
  show_execution(id, execution, worker, now_text)
  add_row(id, execution, queue, job, read_point(id))
  task = '\0plain' -- alone: nothing else matches this
  limit = used
end

-- The oldest suspect of a queue, and as many more of its task as each of them allows.
local function take_suspects(queue)
  local name, company = KEY.suspects .. queue, 128
  limit = free
  for _, id in ipairs(redis.call('ZRANGE', name, 0, 127)) do
    local job = redis.call('HMGET', KEY.job .. id, 'task', 'company', 'origin')
    local allowed = math.min(company, number_of(job[2], 1))
    if job[1] and job[3] ~= queue then
      waited.add(name, id) -- deleted, and its id used again in another queue, where it has a place of its own
    elseif unable[job[1] or ''] then
      aside = aside + 1
    elseif task == '' or not job[1] or job[1] == task then
      if used > 0 and used + 1 > allowed then break end
      local found, later
      local whole = read_job(id)
      if whole.failed_on and passed_over(id, queue, whole, true, incarnation, worker) then
        aside = aside + 1
      else
        found, later = runnable(id, queue, worker, took, waited)
        if not later then waited.add(name, id) end
      end
      if found then
        company, used = allowed, used + 1
        if task == '' then settle_on(job[1]) end
        take_request(id, queue, found)
        if used >= math.min(limit, company) or bytes >= max_bytes then break end
      end
    end
  end
end

-- In each queue that has something aside, move what is due, and look at the suspects. Returns false if this worker
-- is to drain for them first.
local function look_aside()
  -- For all queues together, as far as one call may go: with each of 500 queues by itself it took a second.
  local budget = 128
  for _, queue in ipairs(due_aside(queues)) do
    budget = budget - promote(queue, budget)
    budget = budget - take_bounced(queue, budget)
    -- A worker that is never empty would get none: after 5 s one is reserved for the oldest, and drains.
    local since = empty and '+inf' or int(now_ms - 5000)
    if used == 0 and #redis.call('ZRANGEBYSCORE', KEY.suspects .. queue, '-inf', since, 'LIMIT', 0, 1) > 0 then
      if not may_isolate(incarnation) then
        apart = true
      elseif empty then
        take_suspects(queue)
      else
        isolate(incarnation)
        return false
      end
    end
  end
  return true
end

-- How many more this worker may take out of the queues' lists.
local function set_limit()
  if used > 0 then
    limit = 0 -- suspects have no other company
  elseif task == '' then
    limit = 1 -- until the first entry says which task it is
  elseif short then
    limit = math.min(free, room(slots_of[task] or free + #held / 2, #held / 2))
  else
    limit = free
  end
end

-- What becomes of an entry of a queue's list: 'off' (taken, or not to be run: it leaves the list), 'back' (it keeps its
-- place for others), or 'stop' (it needs an empty worker: it keeps its place, and nothing behind it is looked at).
local function take_entry(id, queue)
  local job, later = runnable(id, queue, worker, took, waited)
  local path = job and job.task
  if later or (path and unable[path] and not job.company) then return 'back' end
  if not job then return 'off' end
  if job.company then
    to_suspects(queue, id) -- it may only run in limited company
    return 'off'
  end
  if job.failed_on and passed_over(id, queue, job, false, incarnation, worker) then return 'back' end
  if (not path and not (empty and task == '')) or (path and task ~= '' and path ~= task) then return 'stop' end
  used = used + 1
  if path then
    if task == '' then settle_on(path) end
    take_request(id, queue, job)
  else
    take_plain(id, queue, job)
  end
  return 'off'
end

-- Take entries of one queue's list until the slots are full. Returns how many were read, which of them stay, and
-- whether that was all.
local function take_entries(queue)
  local back, popped, page, place = {}, 0, {}, 0
  while used < limit and bytes < max_bytes do
    if scanned >= 128 then
      -- If all that was looked at is left to others, to look again at once would find the same.
      status = #back < popped and 'more' or 'blocked'
      break
    end
    place = place + 1
    if place > #page then
      local last = popped + math.min(limit - used, 128 - scanned) - 1
      page, place = redis.call('LRANGE', KEY.queue .. queue, popped, last), 1
      if #page == 0 then return popped, back, true end
    end
    local outcome = take_entry(page[place], queue)
    if outcome == 'stop' then
      status = 'blocked'
      break
    end
    if outcome == 'back' then back[#back + 1] = page[place] end
    popped, scanned = popped + 1, scanned + 1
  end
  return popped, back, false
end

local function take_from_queues()
  for _, queue in ipairs(queues) do
    local popped, back, drained = take_entries(queue)
    if popped > 0 then passed[#passed + 1] = { name = KEY.queue .. queue, popped = popped, back = back } end
    aside = aside + #back
    if status ~= 'ok' then return end
    if drained then
      if #back == 0 then redis.call('DEL', KEY.bell .. queue, KEY.ended .. queue) end
    elseif redis.call('LLEN', KEY.queue .. queue) > popped then
      ring(queue) -- another idle worker may take the rest
      status = 'more'
    end
    if used >= limit then return end
  end
end

local function write_down()
  leases.send()
  holds.send()
  started.send()
  for _, part in ipairs(passed) do
    redis.call('LTRIM', part.name, part.popped, -1)
    for i = #part.back, 1, -1 do redis.call('LPUSH', part.name, part.back[i]) end
  end
  waited.send()
  for queue, many in pairs(taken) do
    count('claimed', queue, many)
    redis.call('ZADD', KEY.aside, 'NX', '+inf', queue)
  end
  if number > 0 then
    local path = task ~= '\0plain' and task or ''
    show_holder(incarnation, worker, queues_text, timeout_ms, lease_ms, path, slots_of[path], empty)
  elseif not empty and slots_of[task] then
    redis.call('HSET', KEY.incarnation .. incarnation, 'slots', int(slots_of[task])) -- known only once it was loaded
  end
end

for _, row in ipairs(given_again(incarnation, held, known, lease_ms)) do
  add_row(row[1], row[2], row[3], read_job(row[1]), read_point(row[1]))
end
if number > 0 then return answer('ok') end -- the caller sees what it holds before it takes more
if redis.call('EXISTS', KEY.suspended) == 1 then return answer('suspended') end
local isolates = redis.call('ZSCORE', KEY.isolating, incarnation)
if isolates and not empty then return answer('blocked') end
if not look_aside() then return answer('blocked') end
if used > 0 then
  isolate(incarnation)
elseif isolates then
  redis.call('ZREM', KEY.isolating, incarnation)
end
set_limit()
if limit < 1 and used == 0 and task ~= '' and short then return answer('blocked') end
take_from_queues()
if status == 'ok' and number == 0 and (apart or aside > 0) then status = 'blocked' end -- what waits is left to others
write_down()
return answer(status)
