-- Take requests from the dead: all that one incarnation held, or whatever a sweep finds expired.
--
-- ARGV incarnation        whose end the caller has evidence of; '' sweeps
-- ARGV kind               failure kind of that evidence
-- ARGV reason             one line for people
-- ARGV exception          traceback for a dead letter, as RQ's result stream holds it
-- ARGV evidence           what the dead left behind, for the history; '' for nothing
-- ARGV charge             '1' charges an attempt
-- ARGV crash              '1' counts a crash; 'alone' counts one for a request that was alone with this worker
-- ARGV loss               '1' counts the loss of a worker
-- ARGV retry              '1' allows another execution
-- ARGV clean              '1' if it has left of its own accord: the pool expects one worker less from now on
-- ARGV hang_exception     traceback for one whose lease expired under a healthy heartbeat
-- ARGV timeout_ms         heartbeat timeout
-- ARGV pulse_ms           the pulse is old after so many ms, or after three times the widest gap of late
-- ARGV limit              requests per call, at most 128
-- ARGV base               s before the first retry
-- ARGV cap                s before a retry at most
-- ARGV max_crashes        crashes alone that make a dead letter
-- ARGV max_crashes_total  crashes in all that make one
-- ARGV max_executions     executions without progress that make one
-- EACH queue: queue       queues to look for expired leases in; none with an incarnation
--
-- Returns  judged ('1'; '0' while nobody may be judged), left ('1' when there is more to do), then rows of:
--          incarnation, worker, id, execution, kind, what became of it ('queued', 'scheduled', 'failed', 'canceled',
--          'ended'; for an incarnation that held nothing more: id '' and 'gone')
--
-- Who is dead is decided in this script, at this moment, not before it: a heartbeat that arrived in between
-- saves its worker. After an outage or a stall (the pulse is missing, old or from the future) the clocks say
-- nothing, and nobody is judged by them for one heartbeat timeout. Evidence from a guardian is always good.
-- Decides by lease and execution, never by RQ's status.

--- @include lib/basics/arguments
--- @include lib/basics/counters
--- @include lib/basics/never_refused
--- @include lib/basics/numbers
--- @include lib/basics/stamps
--- @include lib/basics/time
--- @include lib/failure/bury
--- @include lib/failure/decide
--- @include lib/failure/to_retries
--- @include lib/lease/detach
--- @include lib/lease/lease
--- @include lib/lease/owns
--- @include lib/lease/part
--- @include lib/lease/read_run
--- @include lib/lease/runs
--- @include lib/lease/void
--- @include lib/pool/expect_one_less
--- @include lib/pool/pulse
--- @include lib/pool/served
--- @include lib/queue/forget
--- @include lib/queue/to_front
--- @include lib/queue/turn
--- @include lib/rq/callbacks
--- @include lib/rq/waiters

never_refused()

local incarnation, kind, reason, exception, evidence = arg(), arg(), arg(), arg(), arg()
local charge, crash, loss, retry, clean = arg(), arg(), arg(), arg(), arg()
local hang_exception, timeout_ms, pulse_ms, limit = arg(), arg(), arg(), arg()
local base, cap, max_crashes, max_crashes_total, max_executions = arg(), arg(), arg(), arg(), arg()
timeout_ms, pulse_ms, limit = tonumber(timeout_ms), tonumber(pulse_ms), math.min(tonumber(limit), 128)
local rows, taken, left = {}, 0, '0'

local function report(whose, worker, id, execution, why, outcome)
  for _, value in ipairs({ whose, worker, id, execution, why, outcome }) do rows[#rows + 1] = value end
end

-- A plain RQ job: what RQ would do with an abandoned one, without waiting for its clean-up.
local function reap_plain(queue, id, execution, holder, worker, why, text, blob)
  local name = KEY.job .. id
  local job = redis.call('HMGET', name, 'status', 'retries_left', 'retry_intervals', 'claimed')
  local started = seconds_of(job[4])
  detach(queue, id, execution, holder, worker)
  redis.call('HSET', name, 'execution', '')
  if job[1] ~= 'started' then
    -- RQ has ended it, and its worker may have been lost right after: before it saw to those who wait.
    note_waited_for(id)
    return 'ended'
  end
  local retries = number_of(job[2])
  if retries < 1 then
    bury(queue, id, execution, worker, started, why, text, blob)
    return 'failed'
  end
  redis.call('HSET', name, 'last', execution .. ':retried', 'retries_left', int(retries - 1))
  note_to_tell(id, execution .. ':retried')
  local intervals = {}
  for seconds in string.gmatch(job[3] or '', '%d+') do intervals[#intervals + 1] = tonumber(seconds) end
  local delay = intervals[math.max(#intervals - retries, 0) + 1] or 0
  if delay == 0 then
    to_front(queue, id)
    return 'queued'
  end
  to_retries(queue, id, delay)
  return 'scheduled'
end

local function reap_one(id, execution, holder, worker, why, text, blob, policy)
  local job = read_run(id)
  if not owns(id, execution, job.execution, job.started_at) then
    void(id, execution, holder, job.origin)
    return
  end
  local outcome
  tally('lost:' .. job.origin, why)
  if job.task then
    policy.kind, policy.reason, policy.exception, policy.retry, policy.taken = why, text, blob, retry, '1'
    policy.base, policy.cap, policy.max_crashes = tonumber(base), tonumber(cap), tonumber(max_crashes)
    policy.max_crashes_total, policy.max_executions = tonumber(max_crashes_total), tonumber(max_executions)
    outcome = decide(job.origin, id, job, execution, holder, policy)
  else
    outcome = reap_plain(job.origin, id, execution, holder, worker, why, text, blob)
  end
  taken = taken + 1
  report(holder, worker, id, execution, why, outcome)
end

-- Everything an incarnation holds, then its registration; a tombstone tells a zombie what happened.
local function reap_incarnation(holder, why, text, blob, charged, crashed, lost)
  local record = KEY.incarnation .. holder
  local worker = redis.call('HGET', record, 'worker') or ''
  local held = redis.call('HGETALL', KEY.held .. holder)
  redis.call('HSET', record, 'reaped', why, 'reaped_at', int(now_ms))
  redis.call('HSETNX', record, 'had', int(#held / 2)) -- a second bounded call finds fewer
  local flight = number_of(redis.call('HGET', record, 'had'), 1)
  redis.call('EXPIRE', record, HOUR)
  -- From last to first: each goes to the front, so they stand there in the order of their claims. (A small hash
  -- keeps its order; in a large one it is by chance, which harms nobody.)
  for i = #held - 1, 1, -2 do
    if taken >= limit then
      left = '1'
      return
    end
    reap_one(held[i], held[i + 1], holder, worker, why, text, blob,
      { charge = charged, crash = crashed, loss = lost, flight = flight, evidence = evidence })
  end
  redis.call('DEL', KEY.held .. holder)
  local crowd = redis.call('HGET', record, 'crowd')
  if crowd then pass_turn(crowd, holder) end
  redis.call('ZREM', KEY.unready, holder)
  redis.call('ZREM', KEY.unable, holder)
  if redis.call('ZREM', KEY.beats, holder) == 1 and clean == '1' then expect_one_less(holder, timeout_ms) end
  if worker ~= '' then
    -- A successor may already use the name: only the registration of this incarnation goes, or one that nobody
    -- has (its hash has expired, as after an outage). A worker that lives is registered again by its heartbeat.
    local pid, there = redis.call('HGET', record, 'pid'), redis.call('HGET', KEY.worker .. worker, 'pid')
    if not there or there == pid then
      redis.call('SREM', KEY.workers, KEY.worker .. worker)
      for queue in string.gmatch(redis.call('HGET', record, 'queues') or '', '[^,]+') do
        for _, one in ipairs(served(unlisted(queue))) do
          redis.call('SREM', KEY.workers_of .. one, KEY.worker .. worker)
        end
      end
      redis.call('DEL', KEY.worker .. worker, KEY.worker .. worker .. ':executions')
    end
  end
  add(KEY.counters, 'reaped', 1)
  count('left', clean == '1' and 'LEFT' or why)
  report(holder, worker, '', '', why, 'gone')
end

local function answer(judged)
  write_parted()
  write_tally()
  local reply = { judged, left }
  for _, value in ipairs(rows) do reply[#reply + 1] = value end
  return reply
end

if incarnation ~= '' then
  local done = redis.call('HEXISTS', KEY.incarnation .. incarnation, 'reaped') == 1
    and redis.call('EXISTS', KEY.held .. incarnation) == 0
  if not done then reap_incarnation(incarnation, kind, reason, exception, charge, crash, loss) end
  return answer('1')
end

-- A sweep. Its pulse first: the next one learns from it whether time went on as it should.
local judged, slack, since = pulse(timeout_ms, pulse_ms)
-- What lies further ahead than any heartbeat sets it was set by a clock that has been set back. Of the living it is
-- right with their next one; of the dead, it counts from now.
local furthest = int(now_ms + math.max(timeout_ms, 5000) + 1000)
for _, holder in ipairs(redis.call('ZRANGEBYSCORE', KEY.beats, furthest, '+inf', 'LIMIT', 0, 16)) do
  local longest = number_of(redis.call('HGET', KEY.incarnation .. holder, 'timeout'), timeout_ms)
  if tonumber(redis.call('ZSCORE', KEY.beats, holder)) > now_ms + longest + 1000 then
    redis.call('ZADD', KEY.beats, int(now_ms + longest), holder)
  end
end

if not judged then return answer('0') end

local silent = redis.call('ZRANGEBYSCORE', KEY.beats, '-inf', int(now_ms - slack), 'LIMIT', 0, 16)
if #silent == 16 then left = '1' end -- a whole host is lost: there may be more
for _, holder in ipairs(silent) do
  if taken >= limit then
    left = '1'
    break
  end
  reap_incarnation(holder, kind, reason, exception, charge, crash, loss)
end
local crowd = {}

-- Whether a step of a request whose lease ran out has had its whole time since the sweeps go on without a gap: in an
-- outage nobody can be heard, and when the server's clock steps ahead no time has passed.
local function heard(job, since)
  local lease = number_of(redis.call('HGET', KEY.incarnation .. (job[2] or ''), 'lease'), 30000)
  local length = job[5] and lease_length(job[6], lease) or plain_lease(number_of(job[7], 180))
  return now_ms - since >= length
end

-- How many were in flight on a worker when it hung: as many as it held before this sweep took the first of them, or an
-- earlier sweep, if that was a moment ago; the leases of one hang do not all end at once.
local function in_flight(holder)
  if crowd[holder] then return crowd[holder] end
  local record, held = KEY.incarnation .. holder, redis.call('HLEN', KEY.held .. holder)
  local before = redis.call('HMGET', record, 'hung', 'hung_at')
  if before[1] and now_ms - number_of(before[2]) < 10000 then
    held = math.max(held, number_of(before[1]))
  elseif redis.call('EXISTS', record) == 1 then
    redis.call('HSET', record, 'hung', int(held), 'hung_at', int(now_ms))
  end
  crowd[holder] = held
  return held
end

-- One bound for all queues together; those of which nobody may be judged yet do not use up what others need.
local looked, spared = 0, 0
for _ = 1, tonumber(arg()) do
  local queue = arg()
  local expired = {}
  if looked + taken < limit and spared < 128 then
    expired = redis.call('ZRANGEBYSCORE', KEY.leases .. queue, '-inf', int(now_ms), 'LIMIT', 0, limit)
  elseif looked + taken >= limit then
    left = '1'
  end
  if #expired == limit then left = '1' end -- there may be more
  for _, id in ipairs(expired) do
    if looked + taken >= limit then
      left = '1'
      break
    end
    local job = redis.call('HMGET', KEY.job .. id, 'execution', 'holder', 'worker_name', 'origin', 'task',
      'step_ms', 'timeout')
    local holder = job[2] or ''
    local beat = tonumber(redis.call('ZSCORE', KEY.beats, holder) or '0') - timeout_ms
    if job[4] ~= queue or not runs(id, job[1], holder) then
      -- Nobody holds it there: the job was deleted while it ran, and its id perhaps used again, or a claim was cut
      -- short.
      redis.call('ZREM', KEY.leases .. queue, id)
      forget(id)
      looked = looked + 1
    elseif now_ms - beat > timeout_ms / 2 then
      -- With a short lease, a lost host shows here before its heartbeat runs out. That is no hang.
      reap_one(id, job[1], holder, job[3] or '', kind, reason, exception, { charge = charge, crash = crash, loss = loss,
        flight = in_flight(holder) })
      redis.call('ZREM', KEY.leases .. queue, id) -- RQ may have ended a plain job whose lease stayed behind
    elseif heard(job, since) then
      reap_one(id, job[1], holder, job[3] or '', 'HANG',
        'the lease expired: no progress while its worker\'s heart was beating', hang_exception,
        { charge = '0', crash = '1', loss = '0', flight = in_flight(holder) })
      redis.call('ZREM', KEY.leases .. queue, id)
    else
      spared = spared + 1
    end
  end
end
return answer('1')
