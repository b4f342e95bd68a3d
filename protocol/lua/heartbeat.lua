-- Say that a worker process lives, and keep RQ's records of it young.
--
-- ARGV schema       protocol version of the caller
-- ARGV incarnation  of the worker process
-- ARGV worker       RQ worker name
-- ARGV queues_text  its queues, comma-separated (see listed() in lib/pool/serves)
-- ARGV pid          of the worker process
-- ARGV host         its host name
-- ARGV device       what it computes on
-- ARGV ready        '1' once the tasks to load first are loaded: it claims from now on; 'spare': it waits to be told;
--                   'leaving': it was told to stop, and finishes or hands back what it holds
-- ARGV timeout_ms   ms until it counts as dead without another heartbeat
-- ARGV due_ms       a sweep is due when the reapers' pulse is older than so many ms
-- ARGV unfit        why its device is not to be used; '' if it may be
-- ARGV health       URL of its health pages; '' for none
-- ARGV model        the model that it has for text generation, as its setting names it
-- ARGV stale        the file of which it runs what stood there before; '' for none
-- EACH queue: queue         the worker's queues
-- EACH model: fingerprint   fingerprints of the tasks that it has loaded
-- EACH inability: task      tasks that it could not load: dotted path ...
-- EACH inability: kind      ... 'missing' (the module, or the task in it) or 'broken' (loading it raised) ...
-- EACH inability: age_ms    ... since how many ms ...
-- EACH inability: reason    ... and why, in one line
--
-- Returns  'ok' | 'reaped' (declared dead: start a new incarnation) | 'newer' (Redis holds a newer protocol),
--          then '1' if no reaper has swept lately and the caller should; one guardian is asked at a time, another one
--          when it has not come to the end of its sweep in time
--
-- A device that is not to be used is remembered in the hash `unfit`, for a day after the last word of any: why nobody
-- works there outlives the worker. A worker that is ready on the same device takes it out.
--
-- Worker keys live 60 s. Executions and RQ's started registry are kept an hour ahead, renewed when below half an
-- hour, so that RQ's own clean-up, which any viewer triggers, is only a dead man's switch.

--- @include lib/basics/arguments
--- @include lib/basics/dates
--- @include lib/basics/never_refused
--- @include lib/basics/numbers
--- @include lib/basics/schema
--- @include lib/basics/time
--- @include lib/lease/reaped
--- @include lib/pool/expect_one_less
--- @include lib/pool/served

never_refused()

local schema, incarnation, worker, queues_text, pid = arg(), arg(), arg(), arg(), arg()
local host, device, ready, timeout_ms, due_ms = arg(), arg(), arg(), arg(), arg()
local unfit, health, model, stale = arg(), arg(), arg(), arg()
local queues = {}
for _ = 1, tonumber(arg()) do
  local queue = arg()
  queues[#queues + 1] = queue
end
if not speaks(schema) then return { 'newer', '0' } end
if reaped(incarnation) then return { 'reaped', '0' } end

local dead_at = int(now_ms + tonumber(timeout_ms))
redis.call('ZADD', KEY.beats, dead_at, incarnation)
local record = KEY.incarnation .. incarnation
-- What is not ready (it loads, is a spare, or leaves) is no capacity: see weigh.lua.
if ready == '1' then
  redis.call('ZREM', KEY.unready, incarnation)
  redis.call('HSETNX', record, 'ready_at', int(now_ms))
else
  redis.call('ZADD', KEY.unready, dead_at, incarnation)
  redis.call('EXPIRE', KEY.unready, DAY)
  -- In one step with its end as capacity: no sweep sees that it is missed.
  if ready == 'leaving' then expect_one_less(incarnation, tonumber(timeout_ms)) end
end
redis.call('HSET', record, 'worker', worker, 'queues', queues_text, 'pid', pid, 'host', host, 'device', device,
  'ready', ready, 'timeout', timeout_ms, 'unfit', unfit, 'health', health,
  'model', model, 'stale', stale)
redis.call('HSETNX', record, 'started', int(now_ms))
redis.call('EXPIRE', record, DAY)
-- By its UUID, which is one in the world: hosts with a new name at every start do not fill the hash, and a device that
-- is lost no longer says what it is called.
local place = string.match(device, 'GPU%-%S+') or host .. ' ' .. device
if unfit ~= '' then
  redis.call('HSET', KEY.unfit, place, table.concat({ int(now_ms), device, host, worker, unfit }, '\t'))
  redis.call('EXPIRE', KEY.unfit, DAY)
elseif ready == '1' then
  redis.call('HDEL', KEY.unfit, place)
end
for _ = 1, tonumber(arg()) do
  local fingerprint = arg()
  -- By itself for workers of 0.1, which ask for nothing else.
  local rows = { now_text, fingerprint }
  for _, queue in ipairs(queues) do
    rows[#rows + 1], rows[#rows + 2] = now_text, queue .. ' ' .. fingerprint
    if #rows >= 200 then
      redis.call('ZADD', KEY.fingerprints, unpack(rows))
      rows = {}
    end
  end
  if #rows > 0 then redis.call('ZADD', KEY.fingerprints, unpack(rows)) end
  redis.call('EXPIRE', KEY.fingerprints, DAY)
end

local unable = {}
for _ = 1, tonumber(arg()) do
  local task, kind, age_ms, reason = arg(), arg(), arg(), arg()
  unable[#unable + 1] = table.concat({ task, kind, int(now_ms - tonumber(age_ms)), reason }, '\t')
end
if #unable > 0 then
  redis.call('HSET', record, 'unable', table.concat(unable, '\n'))
  redis.call('ZADD', KEY.unable, dead_at, incarnation)
  redis.call('EXPIRE', KEY.unable, DAY)
elseif redis.call('HDEL', record, 'unable') == 1 then
  redis.call('ZREM', KEY.unable, incarnation)
end

local name = KEY.worker .. worker
if redis.call('EXISTS', name) == 1 and redis.call('HEXISTS', name, 'death') == 0 then
  redis.call('HSET', name, 'last_heartbeat', utc())
  redis.call('EXPIRE', name, 60)
  -- Re-registered every time: after a FLUSHALL or a lost second of AOF, RQ itself never would.
  redis.call('SADD', KEY.workers, name)
  -- For each priority too: RQ registers a worker by the names that it was started with.
  for _, queue in ipairs(queues) do
    for _, one in ipairs(served(queue)) do redis.call('SADD', KEY.workers_of .. one, name) end
  end
end

local renewed = number_of(redis.call('HGET', record, 'wip'))
if now_s - renewed > HOUR / 2 then
  local held = redis.call('HGETALL', KEY.held .. incarnation)
  for i = 1, #held, 2 do
    local id, composite = held[i], held[i] .. ':' .. held[i + 1]
    local queue = redis.call('HGET', KEY.job .. id, 'origin')
    if queue then
      redis.call('ZADD', KEY.wip .. queue, 'XX', int(now_s + 2 * HOUR), composite)
      redis.call('ZADD', KEY.executions .. id, 'XX', int(now_s + 2 * HOUR), held[i + 1])
      redis.call('EXPIRE', KEY.executions .. id, 2 * HOUR)
      redis.call('EXPIRE', KEY.execution .. composite, 2 * HOUR)
    end
  end
  redis.call('EXPIRE', name .. ':executions', 2 * HOUR)
  redis.call('HSET', record, 'wip', int(now_s))
end

local row = redis.call('HMGET', KEY.pulse, 'at', 'gap', 'asked_until')
local at, gap, asked_until = number_of(row[1]), number_of(row[2]), number_of(row[3])
local due = at > now_ms or now_ms - at > tonumber(due_ms)
-- When a sweep takes long, the pulse is old in its middle. If all guardians swept then, it would take longer still.
local patience = math.max(tonumber(timeout_ms) / 2, 3 * gap)
if due and now_ms < asked_until and asked_until - now_ms <= patience then due = false end
if due then redis.call('HSET', KEY.pulse, 'asked', incarnation, 'asked_until', int(now_ms + patience)) end
return { 'ok', due and '1' or '0' }
