--- @include lib/basics/numbers

-- Reset the retries and other counts of a request that has made progress: it stepped for at least 1 s, and its
-- checkpoint is further than the best of all earlier executions. Without the second of stepping, a request that crashes
-- its worker after one more output each time would never become a dead letter. Returns whether it has moved by more
-- than one checkpoint, or for 1 s.
local function credit_progress(id, claimed_ms)
  local name = KEY.job .. id
  local point = redis.call('HMGET', KEY.checkpoint .. id, 'offset', 'seq', 'at', 'stepped')
  if number_of(point[3]) < claimed_ms then return false end
  local offset, seq = number_of(point[1]), number_of(point[2])
  local job = redis.call('HMGET', name, 'best_offset', 'best_seq', 'max_retries')
  local best_offset, best_seq = number_of(job[1]), number_of(job[2])
  -- Compare outputs; the number of the checkpoint counts only where there are none.
  if offset <= best_offset and (offset > 0 or seq <= best_seq) then return false end
  redis.call('HSET', name, 'best_offset', int(math.max(offset, best_offset)), 'best_seq', int(math.max(seq, best_seq)))
  -- A worker of an older release does not write `stepped`, and leaves that of an earlier checkpoint: then the time
  -- since the claim counts, with the loading of the model in it.
  local which, ms = string.match(point[4] or '', '^(%d+):(%d+)$')
  local stepped = which == point[2] and tonumber(ms) or number_of(point[3]) - claimed_ms
  if stepped >= 1000 then
    redis.call('HSET', name, 'retries_left', job[3] or '0', 'executions', '0', 'losses', '0', 'crashes', '0',
      'waits', '0')
    redis.call('HDEL', name, 'raised')
  end
  return seq - best_seq > 1 or stepped >= 1000
end
