--- @include lib/basics/numbers

local HOUR, DAY = 3600, 86400

-- Only the server's clock counts: the clocks of hosts differ.
local clock = redis.call('TIME')
local now_s = tonumber(clock[1])
local now_ms = now_s * 1000 + math.floor(tonumber(clock[2]) / 1000)
local now_text = int(now_ms)
