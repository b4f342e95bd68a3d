--- @include lib/numbers

local HOUR, DAY = 3600, 86400

-- The server's clock is the only one: hosts whose clocks disagree still agree on who is late.
local clock = redis.call('TIME')
local now_s = tonumber(clock[1])
local now_ms = now_s * 1000 + math.floor(tonumber(clock[2]) / 1000)
local now_text = int(now_ms)
