--- @include lib/basics/numbers
--- @include lib/basics/time

-- The pulse of the sweeps, called by each script that judges workers by clocks. Returns whether it may judge them now;
-- the slack (ms): only what ran out so long ago counts as run out; and since when the sweeps have gone on without a
-- gap. A gap between two pulses that is longer than the limit was an outage or a stall. No worker could be heard in it,
-- so nobody is judged for one heartbeat timeout afterwards. The limit is pulse_ms, or three times the widest recent
-- gap: where all calls are slow, sweeps take long, and must judge all the same. A longer limit may miss an outage of
-- that length; so the slack is what the limit has grown by.
local function pulse(timeout_ms, pulse_ms)
  local row = redis.call('HMGET', KEY.pulse, 'at', 'since', 'gap')
  local at, since, widest = number_of(row[1]), number_of(row[2]), number_of(row[3])
  local limit = math.max(pulse_ms, 3 * widest)
  local known = at > 0 and since > 0 and at <= now_ms
  local gap = known and now_ms - at or 0
  if not known or gap > limit then since = now_ms end
  if at > now_ms + 1000 then
    -- The server's clock was set back: until it has caught up, times in Redis may lie too far ahead.
    redis.call('HSET', KEY.pulse, 'back_until', int(at + 60000))
  elseif at > 0 and gap > limit then
    redis.call('HSET', KEY.pulse, 'away_from', int(at), 'away_to', now_text)
  end
  -- At most twice the limit, and shrinking with each sweep: an outage of an hour does not count for longer than a few.
  widest = math.max(math.min(gap, 2 * limit, 2 * timeout_ms), math.floor(widest * 7 / 8))
  redis.call('HSET', KEY.pulse, 'at', int(now_ms), 'since', int(since), 'gap', int(widest))
  return now_ms - since >= timeout_ms, limit - pulse_ms, since
end
