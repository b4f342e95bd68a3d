--- @include lib/pool/places

local BLAMED = { CRASH = true, HANG = true, GPU_ERROR = true, GPU_OOM = true, HOST_OOM = true, WORKER_LOST = true }

-- Remember where a request failed, the last four places, if the place may be at fault: claims prefer others.
local function blame(id, worker, incarnation)
  local kept = { where(incarnation, worker) }
  for line in string.gmatch(redis.call('HGET', KEY.job .. id, 'failed_on') or '', '[^\n]+') do
    if line ~= kept[1] and #kept < 4 then kept[#kept + 1] = line end
  end
  redis.call('HSET', KEY.job .. id, 'failed_on', table.concat(kept, '\n'))
end
