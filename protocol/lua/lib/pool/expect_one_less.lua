--- @include lib/basics/counters
--- @include lib/basics/numbers
--- @include lib/basics/time

-- The pool expects one worker less, once for each worker that leaves in order, from when it is told to: it is no loss.
-- Only one that was ready for a heartbeat timeout can be counted in the peaks (recovery/degradation.py). The new
-- version makes any decision stale that was made from the old peaks.
local function expect_one_less(incarnation, timeout_ms)
  local record = KEY.incarnation .. incarnation
  if redis.call('HSETNX', record, 'leaving_at', int(now_ms)) == 0 then return end
  local ready_at = number_of(redis.call('HGET', record, 'ready_at'))
  local peaks = redis.call('HGET', KEY.mode, 'peaks')
  if ready_at == 0 or now_ms - ready_at < timeout_ms or not peaks then return end
  local fewer = string.gsub(peaks, '(%d+):(%d+)', function(span, number)
    return span .. ':' .. int(math.max(0, number_of(number) - 1))
  end)
  redis.call('HSET', KEY.mode, 'peaks', fewer)
  add(KEY.mode, 'version', 1)
end
