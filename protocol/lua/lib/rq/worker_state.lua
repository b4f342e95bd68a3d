-- Show a worker in RQ as busy while it holds something. It must exist: HSET would bring back a deleted one.
local function show_state(worker, incarnation)
  if worker == '' or redis.call('EXISTS', KEY.worker .. worker) == 0 then return end
  local busy = redis.call('EXISTS', KEY.held .. incarnation) == 1
  redis.call('HSET', KEY.worker .. worker, 'state', busy and 'busy' or 'idle')
end
