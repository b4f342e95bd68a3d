-- Move retries and delayed requests that are due to the end of their queues, and end what waits past its deadline.
--
-- ARGV limit         per queue, at most 128
-- EACH queue: queue  queue names
--
-- Returns  how many were moved, as text
local limit = math.min(tonumber(arg()), 128)
local moved = 0
for _ = 1, tonumber(arg()) do
  local queue = arg()
  end_late(queue, limit)
  moved = moved + promote(queue, limit)
end
return int(moved)
