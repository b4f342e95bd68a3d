--- @include lib/basics/numbers

-- Seconds before retry number n (1 is the first): base * 2^(n-1), at most cap, then spread over its last
-- quarter so that requests which failed together do not come back together. The spread is a hash of
-- request and number, not a random: the schedule of a request can be computed again.
local function backoff(id, n, base, cap)
  local delay = math.min(cap, base * 2 ^ math.min(n - 1, 30))
  local text, hash = id .. ':' .. int(n), 0
  -- Not redis.sha1hex, which fakeredis lacks. Every product stays below 2^53 and so exact; three rounds more
  -- carry the last characters, in which neighbours differ, into the high bits.
  for i = 1, #text + 3 do
    hash = ((hash + (string.byte(text, i) or 0)) * 1664525 + 1013904223) % 4294967296
  end
  return delay * (1 - 0.25 * hash / 4294967296)
end
