--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/rq/callbacks
--- @include lib/rq/waiters

-- A TTL in seconds; RQ's -1 keeps the key for ever.
local function expire(name, ttl)
  if ttl < 0 then
    redis.call('PERSIST', name)
  else
    redis.call('EXPIRE', name, ttl)
  end
end

-- A producer that got no answer sends its submit again for so long (s).
local RESENT = 600

-- If a request is kept for less than that after its end, remember its submit: sent again, it must not be accepted
-- twice.
local function remember(id, ttl)
  if ttl < 0 or ttl >= RESENT then return end
  local nonce = redis.call('HGET', KEY.job .. id, 'nonce') or ''
  if nonce ~= '' then redis.call('SET', KEY.spent .. id, nonce, 'EX', RESENT) end
end

-- After the end, everything of a request shares one TTL.
local function share_ttl(id, ttl)
  remember(id, ttl)
  local waited_for = note_waited_for(id)
  local told = note_to_tell(id, redis.call('HGET', KEY.job .. id, 'last') or '')
  -- The worker that acts upon the note must still find the job.
  if (waited_for or told) and ttl >= 0 then
    ttl = math.max(ttl, 60)
    redis.call('EXPIRE', KEY.job .. id .. ':dependents', ttl)
  end
  for _, name in ipairs({ KEY.job, KEY.output, KEY.history, KEY.results }) do expire(name .. id, ttl) end
end

-- The score of an ended request in RQ's registries: when it may leave them; RQ writes a negative TTL as it is.
local function leaves_at(ttl)
  return int(ttl < 0 and ttl or now_s + ttl)
end
