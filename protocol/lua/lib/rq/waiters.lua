--- @include lib/basics/time

-- Note that jobs may wait for this one, or for its slot under a rate limit. A worker reads the note, looks at the
-- status, and does what RQ's own code does. Returns whether it was noted.
local function note_waited_for(id)
  local name = KEY.job .. id
  if redis.call('EXISTS', name .. ':dependents') == 0 and redis.call('HEXISTS', name, 'rate_limit_key') == 0 then
    return false
  end
  redis.call('SADD', KEY.parents, id)
  redis.call('EXPIRE', KEY.parents, 7 * DAY)
  return true
end
