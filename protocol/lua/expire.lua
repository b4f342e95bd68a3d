-- Delete stale checkpoints with their outputs, and what registries and sets still have of requests that are gone.
--
-- ARGV ttl_ms        age at which a checkpoint is stale
-- ARGV limit         checkpoints per call, at most 128
-- EACH queue: queue  queues whose registries and sets are looked at, at most 16
--
-- Returns  how many checkpoints were deleted, as text
--
-- Backoff and waiting count towards the age; a lease does not let a checkpoint grow old, and neither does a gap in the
-- sweeps (lib/checkpoint/stale). The request starts from zero in a new epoch; its history says so. A dead letter loses
-- its checkpoint in the same way.

--- @include lib/basics/arguments
--- @include lib/basics/never_refused
--- @include lib/basics/numbers
--- @include lib/basics/pages
--- @include lib/basics/time
--- @include lib/checkpoint/restart
--- @include lib/checkpoint/stale
--- @include lib/ending/is_canceled
--- @include lib/ending/settle_canceled
--- @include lib/lease/runs
--- @include lib/queue/aside
--- @include lib/queue/forget
--- @include lib/queue/keep_requeued
--- @include lib/rq/ended

never_refused()

local ttl_ms, limit = tonumber(arg()), math.min(tonumber(arg()), 128)
local stale = 0
local before = int(stale_before(ttl_ms))
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEY.checkpoints, '-inf', before, 'LIMIT', 0, limit)) do
  local job = redis.call('HMGET', KEY.job .. id, 'execution', 'origin', 'status', 'holder', 'created_at')
  if not job[5] then
    forget(id)
  elseif runs(id, job[1], job[4]) then
    redis.call('ZADD', KEY.checkpoints, int(now_ms), id)
    if redis.call('HEXISTS', KEY.checkpoint .. id, 'at') == 1 then
      redis.call('HSET', KEY.checkpoint .. id, 'at', int(now_ms))
    end
  elseif number_of(redis.call('HGET', KEY.checkpoint .. id, 'at')) > tonumber(before) then
    -- The index is exact to some seconds; the checkpoint itself knows.
    redis.call('ZADD', KEY.checkpoints, redis.call('HGET', KEY.checkpoint .. id, 'at'), id)
  elseif ENDED[job[3] or ''] then
    -- It has ended. Its outputs may still be read; only going on from them is over.
    drop_checkpoint(id)
    stale = stale + 1
  else
    restart(id, 'the checkpoint was older than ' .. int(ttl_ms / 1000) .. ' s')
    stale = stale + 1
  end
end
redis.call('ZREMRANGEBYSCORE', KEY.fingerprints, '-inf', int(now_ms - 1000 * DAY))

-- Of each set a page, another one each time: RQ's Job.delete and Queue.empty know nothing of ours, and RQ itself never
-- tidies its canceled registry. An id in a list stays; the claim that meets it drops it.
local function tidy(name, queue)
  for _, id in ipairs(some_of(name .. queue, 32, 10000)) do
    local job = redis.call('HMGET', KEY.job .. id, 'created_at', 'status', 'execution', 'holder')
    if not job[1] then
      redis.call('ZREM', name .. queue, id)
      forget(id)
    elseif name == KEY.canceled and is_canceled(job[2]) and not runs(id, job[3], job[4]) then
      settle_canceled(id) -- RQ's Job.cancel takes it out of its list: no claim would meet it
    end
  end
end

for _ = 1, tonumber(arg()) do
  local queue = arg()
  for _, registry in ipairs({ KEY.finished, KEY.failed }) do
    local old = redis.call('ZRANGEBYSCORE', registry .. queue, '(0', int(now_s), 'LIMIT', 0, 128)
    if #old > 0 then redis.call('ZREM', registry .. queue, unpack(old)) end
  end
  for _, name in ipairs({ KEY.canceled, KEY.leases, KEY.retries, KEY.deadlines, KEY.suspects }) do tidy(name, queue) end
  -- Those at both ends of the list are looked at more often: promote.lua.
  keep_requeued(queue, some_of(KEY.queue .. queue, 256, 10000, 'LRANGE', 'LLEN'))
  if redis.call('EXISTS', KEY.queue .. queue) == 0 then redis.call('DEL', KEY.ended .. queue) end
  settle_aside(queue)
  redis.call('SREM', KEY.swept, queue)
end
return int(stale)
