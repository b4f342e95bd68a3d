-- Delete stale checkpoints with their outputs, and old entries of RQ's registries.
--
-- ARGV ttl_ms        age at which a checkpoint is stale
-- ARGV limit         checkpoints per call, at most 128
-- EACH queue: queue  queues whose registries are looked at
--
-- Returns  how many checkpoints were deleted, as text
--
-- Backoff and waiting count towards the age; a lease does not let a checkpoint grow old. The request starts
-- from zero in a new epoch; its history says so. A dead letter loses its checkpoint in the same way.
local ttl_ms, limit = tonumber(arg()), math.min(tonumber(arg()), 128)
local stale = 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEY.checkpoints, '-inf', int(now_ms - ttl_ms), 'LIMIT', 0, limit)) do
  local job = redis.call('HMGET', KEY.job .. id, 'execution', 'origin', 'status')
  if not job[3] then
    forget(id)
  elseif job[1] and job[1] ~= '' then
    redis.call('ZADD', KEY.checkpoints, int(now_ms), id)
    if redis.call('HEXISTS', KEY.checkpoint .. id, 'at') == 1 then redis.call('HSET', KEY.checkpoint .. id, 'at', int(now_ms)) end
  elseif job[3] == 'failed' or job[3] == 'canceled' or job[3] == 'stopped' or job[3] == 'finished' then
    -- It has ended. Its outputs may still be read; only going on from them is over.
    drop_checkpoint(id)
    stale = stale + 1
  else
    restart(id, 'the checkpoint was older than ' .. int(ttl_ms / 1000) .. ' s')
    stale = stale + 1
  end
end
for _ = 1, tonumber(arg()) do
  local queue = arg()
  for _, registry in ipairs({ KEY.finished, KEY.failed }) do
    local old = redis.call('ZRANGEBYSCORE', registry .. queue, '(0', int(now_s), 'LIMIT', 0, 128)
    if #old > 0 then redis.call('ZREM', registry .. queue, unpack(old)) end
  end
end
return int(stale)
