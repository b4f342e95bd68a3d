--- @include lib/numbers

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
