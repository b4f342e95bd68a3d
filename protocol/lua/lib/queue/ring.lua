local rung_here = {}

-- Wake one idle worker. It may get lost: one of the idle workers claims every second in any case. If eight rings wait,
-- nobody is idle.
local function ring(queue)
  local name, before = KEY.bell .. queue, rung_here[queue] or 0
  if before >= 8 then return end -- of this very call
  rung_here[queue] = before + 1
  local rung = redis.call('LLEN', name)
  if rung >= 8 then return end
  redis.call('LPUSH', name, '1')
  if rung == 0 then redis.call('EXPIRE', name, 60) end
end
