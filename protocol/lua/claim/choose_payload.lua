--- @include lib/checkpoint/history

-- What begins from zero while the pool is degraded takes the payload that its producer gave for that, and afterwards
-- the whole one again. The one that runs stands in `payload`, the other one aside: so whoever resumes it, a worker of
-- an older release too, runs the same. For a request with `degraded`; short: whether the pool is degraded.
local function choose_payload(id, job, short)
  if redis.call('EXISTS', KEY.checkpoint .. id) == 1 then return end
  local wanted = short and '1' or '0'
  if wanted == job.degraded then return end
  local name = KEY.job .. id
  local payloads = redis.call('HMGET', name, 'payload', 'payload_aside')
  if not payloads[2] then return end
  redis.call('HSET', name, 'degraded', wanted, 'payload', payloads[2], 'payload_aside', payloads[1])
  local reason = short and 'the pool is degraded: it runs with its overrides'
    or 'the pool has recovered: it runs without its overrides'
  history(id, short and 'degraded' or 'restored', '', '', '0', '', reason)
  job.payload = payloads[2]
end
