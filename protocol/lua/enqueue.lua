-- Store new requests and put them at the end of their queues, or aside until their time has come.
--
-- ARGV schema     protocol version of the caller
-- ARGV client     channel of the producer's replies
-- ARGV limit      most requests that may wait in a queue; 0 for any number
-- EACH kind: queue          queue name
-- EACH kind: durable        '1' if the caller waits until it is on disk
-- EACH kind: delay          ms until it may enter its queue; 0 for at once
-- EACH kind: deadline       ms from now until it must have ended; 0 for no limit
-- EACH kind: deadline_at    the same as ms since 1970; 0 for no limit
-- EACH kind: queue_timeout  ms that it may wait in its queue for its first worker; 0 for any time
-- EACH kind: besides        how many rows of `stored` its requests have; those of the first kind come first
-- EACH stored: name   field of the job hash
-- EACH stored: value  what it holds
-- EACH request: id           request id, [A-Za-z0-9_-]
-- EACH request: nonce        one per submit; the same again when a call is sent again
-- EACH request: kind         which of the kinds it is, from 1: most requests of one call have all of that in common
-- EACH request: payload      msgpack
-- EACH request: digest       of task and body, if the id was made from an idempotency key; else ''
-- EACH request: degraded_payload  msgpack: the payload for a pool that is degraded; '' for none
--
-- Returns  per request 'accepted', 'already' (this very submit was applied before), 'same' (another submit with
--          the same idempotency key and body was) or 'conflict' (the id belongs to another request) or 'full'
--          (as many wait as the limit allows; nothing was stored) or 'degraded <ms> <live> <expected>' (the pool takes
--          no low priority for at least so many ms; nothing was stored); or only 'newer' if Redis holds a newer
--          protocol.
--
-- While the pool is degraded, whatever counts from now takes twice as long: deadline and queue_timeout are doubled.
-- The request remembers that it met such a pool, so that whoever waits for it waits twice as long by default.
-- What waits is what stands in the queue's list, but for what has ended there, or aside for its time.
-- Identity comes before anything that could refuse: a producer whose reply was lost sends the call again
-- and must hear that its request is in.

--- @include lib/basics/arguments
--- @include lib/basics/counters
--- @include lib/basics/dates
--- @include lib/basics/numbers
--- @include lib/basics/schema
--- @include lib/basics/time
--- @include lib/checkpoint/history
--- @include lib/ending/watch_deadline
--- @include lib/failure/to_retries
--- @include lib/pool/mode
--- @include lib/queue/forget
--- @include lib/queue/ring

local schema, client, limit = arg(), arg(), tonumber(arg())
if not speaks(schema) then return { 'newer' } end
local answers, accepted, short = {}, {}, degraded()

-- It is over when there have been enough workers for a while; at the earliest, that begins now.
local function refusal()
  local mode = redis.call('HMGET', KEY.mode, 'live', 'expected', 'recovering', 'dwell')
  local since, dwell = number_of(mode[3]), number_of(mode[4], 5000)
  if since == 0 or since > now_ms then since = now_ms end
  local left = int(math.max(1000, since + dwell - now_ms))
  return table.concat({ 'degraded', left, int(number_of(mode[1])), int(number_of(mode[2])) }, ' ')
end

local function field(kind, name, value)
  kind.fields[#kind.fields + 1] = name
  kind.fields[#kind.fields + 1] = value
end

local kinds, date, factor = {}, utc(), short and 2 or 1
for number = 1, tonumber(arg()) do
  local queue, durable, delay, deadline, deadline_at, queue_timeout = arg(), arg(), arg(), arg(), arg(), arg()
  local besides = tonumber(arg())
  local kind = { queue = queue, durable = durable, delay = tonumber(delay), deadline = tonumber(deadline_at),
    soon = factor * tonumber(deadline), queue_timeout = factor * tonumber(queue_timeout), besides = besides }
  if kind.soon > 0 then kind.deadline = now_ms + kind.soon end
  -- RQ writes '' for what a job does not have, and reads a missing field the same way. Here they stay away: a dozen of
  -- names that say nothing.
  kind.fields = { 'created_at', date, 'enqueued_at', kind.delay > 0 and '' or date, 'origin', queue, 'status', 'queued',
    'timeout', '-1', 'client', client }
  if short then field(kind, 'stretched', '1') end
  if kind.deadline > 0 then field(kind, 'deadline', int(kind.deadline)) end
  if kind.soon > 0 or kind.queue_timeout > 0 then field(kind, 'counted_from', now_text) end
  if kind.deadline > 0 and kind.soon == 0 then field(kind, 'dated', '1') end
  kinds[number] = kind
end
local last = 1
for _ = 1, tonumber(arg()) do
  local name, value = arg(), arg()
  while kinds[last].besides == 0 do last = last + 1 end
  kinds[last].besides = kinds[last].besides - 1
  field(kinds[last], name, value)
end

-- Who is let in is decided first, for all of them; then the ids enter their queues; their jobs are written last. If the
-- script stops in between, an id without a job stands in a queue, which its claim drops, and the producer, whose call
-- has failed, sends it again. In another order it would hear 'already' of a request that stands nowhere.
local seen, new, entering, waiting = {}, {}, {}, {}

-- How many wait in a queue, with those that this call puts there.
local function depth(queue)
  if not waiting[queue] then
    waiting[queue] = math.max(0, redis.call('LLEN', KEY.queue .. queue) - redis.call('ZCARD', KEY.ended .. queue))
      + redis.call('ZCARD', KEY.retries .. queue) + redis.call('ZCARD', KEY.suspects .. queue)
  end
  return waiting[queue] + (accepted[queue] or 0)
end

for _ = 1, tonumber(arg()) do
  local id, nonce, kind, payload, digest, degraded_payload = arg(), arg(), arg(), arg(), arg(), arg()
  kind = kinds[tonumber(kind)]
  local queue = kind.queue
  -- Always a write: WAITAOF waits for those of its own connection, also for a request that another call stored.
  if kind.durable == '1' then count('durable', queue) end
  local name = KEY.job .. id
  -- Nothing at all is there, mostly: one question for everything.
  local there = redis.call('EXISTS', name, KEY.output .. id, KEY.checkpoint .. id, KEY.history .. id, KEY.results .. id,
    KEY.spent .. id) > 0
  local stored = seen[id] or there and redis.call('EXISTS', name) == 1 and redis.call('HMGET', name, 'nonce', 'digest')
  if not stored and there and redis.call('GET', KEY.spent .. id) == nonce then
    -- It has ended, and was kept for less time than the producer took to send this again.
    answers[#answers + 1] = 'already'
  elseif stored then
    local same = digest ~= '' and stored[2] == digest
    answers[#answers + 1] = stored[1] == nonce and 'already' or same and 'same' or 'conflict'
  elseif short and string.sub(queue, -4) == '-low' then
    count('refused', queue)
    answers[#answers + 1] = refusal()
  elseif limit > 0 and depth(queue) >= limit then
    answers[#answers + 1] = 'full'
  else
    -- What an expired request of this id has left, its place among the checkpoints too.
    if there then
      drop_checkpoint(id)
      redis.call('DEL', KEY.output .. id, KEY.history .. id, KEY.results .. id)
    end
    seen[id] = { nonce, digest }
    new[#new + 1] = {
      id = id, nonce = nonce, kind = kind, payload = payload, digest = digest, degraded = degraded_payload,
    }
    if kind.delay == 0 then
      if not entering[queue] then entering[queue] = {} end
      table.insert(entering[queue], id)
    end
    accepted[queue] = (accepted[queue] or 0) + 1
    answers[#answers + 1] = 'accepted'
  end
end

for queue in pairs(accepted) do redis.call('SADD', KEY.queues, KEY.queue .. queue) end
for queue, ids in pairs(entering) do redis.call('RPUSH', KEY.queue .. queue, unpack(ids)) end
for _, request in ipairs(new) do
  local id, kind = request.id, request.kind
  local name, queue, deadline = KEY.job .. id, kind.queue, kind.deadline
  redis.call('HSET', name, 'payload', request.payload, 'nonce', request.nonce, unpack(kind.fields))
  if request.digest ~= '' then redis.call('HSET', name, 'digest', request.digest) end
  if request.degraded ~= '' then redis.call('HSET', name, 'degraded', '0', 'payload_aside', request.degraded) end
  if short and (kind.soon > 0 or kind.queue_timeout > 0) then
    history(id, 'stretched', '', '', '0', '',
      'the pool was degraded at its submit: it has twice the time that was given')
  end
  if kind.delay > 0 then to_retries(queue, id, kind.delay / 1000) end
  if kind.queue_timeout > 0 then
    local queue_deadline = now_ms + kind.delay + kind.queue_timeout
    redis.call('HSET', name, 'queue_deadline', int(queue_deadline))
    if deadline == 0 or queue_deadline < deadline then deadline = queue_deadline end
  end
  if deadline > 0 then watch(queue, id, deadline) end
end
for queue, number in pairs(accepted) do count('submitted', queue, number) end
for queue in pairs(entering) do ring(queue) end
return answers
